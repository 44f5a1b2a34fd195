"""The loop of nexus_eager.py under Hugging Face accelerate. It prints the same losses, on any number of processes.

`accelerate launch --cpu --num_processes 2 with_accelerate.py` gives each of two processes one half of each batch.

pip install 'nexus-optim[trainers]'
"""

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, TensorDataset

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
device = accelerator.device.type
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1)).to(device)
schedule = WSD(warmup_steps=20, stable_steps=180, decay_steps=100, peak_lr=1e-2)
optimizer = FusedAdamW(model.parameters(), lr=schedule, weight_decay=0.01, max_grad_norm=1.0)
x = torch.randn(300 * 256, 8)
batches = DataLoader(TensorDataset(x, x.sin().sum(1, keepdim=True)), batch_size=256)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)


def train_step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    return loss


losses = []
for step, (x, y) in enumerate(batches):
    loss = train_step(x, y)
    if step % 50 == 49:
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        accelerator.print(f"step {step + 1}: loss {losses[-1]:.4f}")
accelerator.end_training()
