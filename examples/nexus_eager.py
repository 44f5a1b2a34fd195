"""The loop of plain_torch.py with nexus: clipping, schedule and update in one call. It prints the same losses."""

import torch

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)).to(device)
schedule = WSD(warmup_steps=20, stable_steps=180, decay_steps=100, peak_lr=1e-2)
optimizer = FusedAdamW(model.parameters(), lr=schedule, weight_decay=0.01, max_grad_norm=1.0)


def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    return loss


losses = []
for step in range(300):
    x = torch.randn(256, 8)
    loss = train_step(x.to(device), x.sin().sum(1, keepdim=True).to(device))
    if step % 50 == 49:
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
