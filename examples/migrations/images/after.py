"""The training of before.py with nexus: groups, rates, clipping and the EMA belong to the optimizer.

The optimizer's state dict holds the count of its updates, which the schedule is evaluated at, and the averages.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from model import VisionTransformer, gratings

from nexus.optim import EMA, FusedAdamW, param_groups
from nexus.schedules import Cosine

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, help="saved after each epoch, and gone on from if it is there")
checkpoint = parser.parse_args().checkpoint

epochs, warmup_epochs, batch_size = 10, 1, 64
lr, weight_decay, layer_decay, clip_grad, ema_decay = 3e-3, 0.05, 0.75, 1.0, 0.95
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = (each.to(device) for each in gratings(1024, seed=0))
test_images, test_labels = (each.to(device) for each in gratings(512, seed=1))
updates, warmup_updates = (count * (len(images) // batch_size) for count in (epochs, warmup_epochs))

torch.manual_seed(0)
model = VisionTransformer().to(device)
no_decay = {"pos_embed": {"weight_decay": 0.0}}
groups = param_groups(model, weight_decay=weight_decay, layer_decay=layer_decay, overrides=no_decay)
schedule = Cosine(peak_lr=lr, total_steps=updates, warmup_steps=warmup_updates)
optimizer = FusedAdamW(groups, lr=schedule, max_grad_norm=clip_grad, average=EMA(ema_decay))
start_epoch = 0
if checkpoint and checkpoint.exists():
    saved = torch.load(checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start_epoch = saved["epoch"]

for epoch in range(start_epoch, epochs):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).to(device)
    for batch in order.split(batch_size):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), optimizer.averaged():
        logits = model(test_images)
    test_loss = F.cross_entropy(logits, test_labels).item()
    accuracy = (logits.argmax(1) == test_labels).float().mean().item()
    print(f"epoch {epoch + 1}: loss of the EMA {test_loss:.4f}, accuracy {accuracy:.1%}", flush=True)
    if not checkpoint:
        continue
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch + 1,
    }
    torch.save(saved, checkpoint.with_suffix(".new"))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)  # whole, or not at all
