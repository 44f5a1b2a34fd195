"""A rate that is halved while the loss does not improve. Each step, with its report, is one CUDA graph on CUDA.

What to see: nothing in the loop reads the loss. The mean of every 20 losses is compared on the device, and the rate
is halved there; without CUDA, the same steps run eagerly.
"""

import torch

from nexus.optim import FusedAdamW
from nexus.schedules import Constant, ReduceOnPlateau
from nexus.training import capture_train_step

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)).to(device)
schedule = ReduceOnPlateau(Constant(3e-2).warmup(20), factor=0.5, patience=2, threshold=0.01, every=20)
optimizer = FusedAdamW(model.parameters(), lr=schedule, weight_decay=0.01, max_grad_norm=1.0)


def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.report(loss)
    return loss


train_step = capture_train_step(train_step, optimizer)
losses, rates = [], []
for step in range(1200):
    x = torch.randn(256, 8)
    y = x.sin().sum(1, keepdim=True) + 0.3 * torch.randn(256, 1)
    loss = train_step(x.to(device), y.to(device))
    if step % 150 == 149:
        losses.append(loss.item())
        rates.append(optimizer.param_groups[0]["lr"].item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}, rate {rates[-1]:.5f}")
