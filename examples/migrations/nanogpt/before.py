"""A loop in the style of nanoGPT's train.py: groups by dimension, get_lr(), accumulated gradients, clipping.

The text counts: " 0 1 2 3 ...". `diff before.py after.py` shows what moving to nexus changes.
"""

import argparse
import math
from pathlib import Path

import torch
from model import GPT

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


def get_lr(it: int) -> float:
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return min_lr + coeff * (learning_rate - min_lr)


torch.manual_seed(1337)
model = GPT(len(vocabulary), block_size).to(device)
params = [p for p in model.parameters() if p.requires_grad]
decay_params = [p for p in params if p.dim() >= 2]
nodecay_params = [p for p in params if p.dim() < 2]
optim_groups = [
    {"params": decay_params, "weight_decay": weight_decay},
    {"params": nodecay_params, "weight_decay": 0.0},
]
optimizer = torch.optim.AdamW(optim_groups, lr=learning_rate, betas=(beta1, beta2))

start = 0
if checkpoint and checkpoint.exists():
    saved = torch.load(checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["iter_num"]

for iter_num in range(start, max_iters):
    torch.manual_seed(iter_num)  # the same batches in a resumed run
    lr = get_lr(iter_num)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    total = 0.0
    for _ in range(gradient_accumulation_steps):
        logits, loss = model(*get_batch())
        loss = loss / gradient_accumulation_steps
        total += loss.detach()
        loss.backward()
    if grad_clip != 0.0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if (iter_num + 1) % log_interval == 0:
        print(f"iter {iter_num + 1}: loss {total.item():.4f}, lr {lr:.2e}")

if checkpoint:
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": max(start, max_iters)}
    torch.save(saved, checkpoint)
