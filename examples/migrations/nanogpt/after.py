"""The loop of before.py with nexus: groups, rate and clipping are arguments of the optimizer.

The optimizer computes its rate on the device at its own count of updates, which its state dict keeps. A run that
before.py has begun goes on here from its checkpoint, as if nothing had happened.
"""

import argparse
from pathlib import Path

import torch
from model import GPT

from nexus.optim import FusedAdamW, param_groups
from nexus.schedules import Cosine

parser = argparse.ArgumentParser()
parser.add_argument("--max_iters", type=int, default=120)
parser.add_argument("--checkpoint", type=Path, help="saved at the end, and gone on from if it is there")
arguments = parser.parse_args()

log_interval = 20
max_iters, checkpoint = arguments.max_iters, arguments.checkpoint
gradient_accumulation_steps = 2
batch_size, block_size = 8, 32
learning_rate, min_lr = 1e-2, 1e-3
warmup_iters, lr_decay_iters = 10, 100
weight_decay, beta1, beta2 = 1e-1, 0.9, 0.95
grad_clip = 1.0

device = "cuda" if torch.cuda.is_available() else "cpu"
text = "".join(f" {number}" for number in range(200)) * 5
vocabulary = sorted(set(text))
data = torch.tensor([vocabulary.index(letter) for letter in text])


def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(data) - block_size, (batch_size, 1))
    rows = data[starts + torch.arange(block_size + 1)].to(device)
    return rows[:, :-1], rows[:, 1:]


torch.manual_seed(1337)
model = GPT(len(vocabulary), block_size).to(device)
decay = Cosine(peak_lr=learning_rate, total_steps=lr_decay_iters - warmup_iters, min_lr=min_lr)
schedule = decay.warmup(steps=warmup_iters, count="(t+1)/(W+1)")
optim_groups = param_groups(model, weight_decay=weight_decay)
optimizer = FusedAdamW(optim_groups, lr=schedule, betas=(beta1, beta2), max_grad_norm=grad_clip)

start = 0
if checkpoint and checkpoint.exists():
    saved = torch.load(checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["iter_num"]

for iter_num in range(start, max_iters):
    torch.manual_seed(iter_num)  # the same batches in a resumed run
    total = 0.0
    for _ in range(gradient_accumulation_steps):
        logits, loss = model(*get_batch())
        loss = loss / gradient_accumulation_steps
        total += loss.detach()
        loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if (iter_num + 1) % log_interval == 0:
        lr = optimizer.param_groups[0]["lr"].item()
        print(f"iter {iter_num + 1}: loss {total.item():.4f}, lr {lr:.2e}")

if checkpoint:
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": max(start, max_iters)}
    torch.save(saved, checkpoint)
