"""A training loop in plain PyTorch: AdamW, clipping, and a warmup-stable-decay rate by LambdaLR.

It is the first of three; `diff plain_torch.py nexus_eager.py` and `diff nexus_eager.py nexus_captured.py` show the
lines that change on the way to a fused step and then to one CUDA graph. All three print the same losses.
"""

import torch

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20, (300 - step) / 100))


def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return loss


losses = []
for step in range(300):
    x = torch.randn(256, 8)
    loss = train_step(x.to(device), x.sin().sum(1, keepdim=True).to(device))
    if step % 50 == 49:
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
