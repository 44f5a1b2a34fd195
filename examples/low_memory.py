"""Fine-tune in bfloat16 with 7 bytes a parameter instead of the 16 of float32, and go on in torch.optim.AdamW.

What to see: parameters, gradients and state take less than half of the memory, and the loss is that of float32. The
checkpoint holds float32 weights and moments, with which torch's optimizer goes on.
"""

import copy
import tempfile
from pathlib import Path

import torch

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SEVEN_BYTES = {"master_weight_bits": 24, "exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
SCHEDULE = WSD(warmup_steps=20, stable_steps=180, decay_steps=100, peak_lr=1e-3)
device = "cuda" if torch.cuda.is_available() else "cpu"


def data(seed: int, shift: float, size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in eight dimensions, and a function of them; another `shift` is another task."""
    x = torch.randn(size, 8, generator=torch.Generator().manual_seed(seed))
    return x.to(device), (2 * x + shift).sin().sum(1, keepdim=True).to(device)


def loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)).float() - y).square().mean()


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, shift: float) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, *data(seed=step + 1, shift=shift)).backward()
        optimizer.step()


def held_out(model: torch.nn.Module) -> float:
    with torch.no_grad():
        return loss(model, *data(seed=0, shift=0.5, size=5000)).item()


def megabytes(optimizer: torch.optim.Optimizer) -> float:
    """Of the parameters, their gradients and their state, as they are in memory."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return sum(each.nbytes for each in [*params, *(param.grad for param in params), *states]) / 1e6


def line(run: str, size: str, bytes_each: str, result: float) -> None:
    print(f"{run:<46} {size:>9} {bytes_each:>18} {result:>14.3f}")


torch.manual_seed(0)
pretrained = torch.nn.Sequential(
    torch.nn.Linear(8, 512), torch.nn.GELU(), torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 1)
).to(device)
train(pretrained, FusedAdamW(pretrained.parameters(), lr=SCHEDULE), range(300), shift=0.0)
print(f"{'fine-tuned for 200 steps':<46} {'megabytes':>9} {'bytes a parameter':>18} {'held-out loss':>14}")
line("not yet", "", "", held_out(pretrained))

results, memory = {}, {}
for run, dtype, options in (
    ("float32", torch.float32, {}),
    ("bfloat16 + 24-bit master, 8-bit moments", torch.bfloat16, SEVEN_BYTES),
):
    model = copy.deepcopy(pretrained).to(dtype)
    optimizer = FusedAdamW(model.named_parameters(), lr=SCHEDULE, **options)
    if options:
        optimizer.load_master(pretrained.state_dict())  # the bits that bfloat16 has no room for
    train(model, optimizer, range(300, 500), shift=0.5)
    results[run], memory[run] = held_out(model), (megabytes(optimizer), optimizer.bytes_per_parameter())
    line(run, *(f"{each:.2f}" for each in memory[run]), results[run])

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "optimizer.pt"
    torch.save(optimizer.state_dict(), path)
    saved = torch.load(path, weights_only=True)
model.float()
with torch.no_grad():
    for index, param in enumerate(model.parameters()):
        param.copy_(saved["state"][index].pop("master_param"))
peer = torch.optim.AdamW(model.named_parameters())
peer.load_state_dict(saved)
train(model, peer, range(500, 700), shift=0.5)
results["torch"] = held_out(model)
line("the latter, 200 more of torch.optim.AdamW", "", "", results["torch"])
