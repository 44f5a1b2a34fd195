"""Several decays from one checkpoint of the stable phase of a WSD run.

A warmup-stable-decay run need not know its length: the stable phase is saved once, and a decay of any length is
branched off it. What to see: each decay ends below the loss of the stable phase, longer ones lower, and none of them
trains the stable phase again.
"""

import tempfile
import warnings
from pathlib import Path

import torch

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

STABLE, DECAYS = 600, (25, 50, 100, 200, 400)
device = "cuda" if torch.cuda.is_available() else "cpu"
# The checkpoint's schedule has another decay_steps than a branch's. That is the point, and no reason to warn.
warnings.filterwarnings("ignore", "lr_schedule.decay_steps")


def data(seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in eight dimensions, and a function of them with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 8, generator=generator)
    y = (2 * x).sin().sum(1, keepdim=True) + 0.5 * torch.randn(size, 1, generator=generator)
    return x.to(device), y.to(device)


def make(decay_steps: int) -> tuple[torch.nn.Module, FusedAdamW]:
    """The model as it is before training, and an optimizer whose stable phase has no end yet."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 128), torch.nn.GELU(), torch.nn.Linear(128, 128), torch.nn.GELU(), torch.nn.Linear(128, 1)
    ).to(device)
    schedule = WSD(warmup_steps=50, stable_steps=None, decay_steps=decay_steps, peak_lr=1e-2)
    return model, FusedAdamW(model.parameters(), lr=schedule, max_grad_norm=1.0)


def train(model: torch.nn.Module, optimizer: FusedAdamW, start: int, stop: int) -> None:
    for step in range(start, stop):
        x, y = data(seed=step + 1, size=32)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def held_out(model: torch.nn.Module) -> float:
    """Mean squared error on fresh points; 0.25 is the noise, which no model can predict."""
    x, y = data(seed=0, size=20_000)
    with torch.no_grad():
        return float((model(x) - y).square().mean())


def line(run: str, steps: int, optimizer: FusedAdamW, loss: float) -> None:
    print(f"{run:<28} {steps:>13} {optimizer.param_groups[0]['lr'].item():>10.1e} {loss:>14.3f}")


results = {}
with tempfile.TemporaryDirectory() as folder:
    checkpoint = Path(folder) / "stable.pt"
    model, optimizer = make(decay_steps=1)
    train(model, optimizer, 0, STABLE)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    results[0] = held_out(model)
    print(f"{'run':<28} {'steps trained':>13} {'last rate':>10} {'held-out loss':>14}")
    line("stable phase, saved", STABLE, optimizer, results[0])

    for decay_steps in DECAYS:
        model, optimizer = make(decay_steps)
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        optimizer.begin_decay()  # with the next step
        train(model, optimizer, STABLE, STABLE + decay_steps)
        results[decay_steps] = held_out(model)
        line(f"branch: decay over {decay_steps} steps", decay_steps, optimizer, results[decay_steps])
