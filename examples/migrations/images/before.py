"""Image training in the style of timm: rates by depth, warm-up and cosine, clipping, an EMA of the weights, epochs.

A run that is killed goes on from its last whole epoch when it is started again. `diff before.py after.py` shows what
moving to nexus changes.
"""

import argparse
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from model import VisionTransformer, gratings
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

parser = argparse.ArgumentParser()
parser.add_argument("--checkpoint", type=Path, help="saved after each epoch, and gone on from if it is there")
checkpoint = parser.parse_args().checkpoint

epochs, warmup_epochs, batch_size = 10, 1, 64
lr, weight_decay, layer_decay, clip_grad, ema_decay = 3e-3, 0.05, 0.75, 1.0, 0.95
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = (each.to(device) for each in gratings(1024, seed=0))
test_images, test_labels = (each.to(device) for each in gratings(512, seed=1))
updates, warmup_updates = (count * (len(images) // batch_size) for count in (epochs, warmup_epochs))


def param_groups_layer_decay(model: VisionTransformer) -> list[dict]:
    groups: dict = {}
    last = len(model.blocks) + 1
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        layer = last
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        elif name.startswith(("patch_embed.", "pos_embed")):
            layer = 0
        decay = 0.0 if param.ndim == 1 or name == "pos_embed" else weight_decay
        options = {"lr": lr * layer_decay ** (last - layer), "weight_decay": decay}
        groups.setdefault((layer, decay), {"params": [], **options})["params"].append(param)
    return list(groups.values())


def lr_factor(update: int) -> float:
    if update < warmup_updates:
        return update / warmup_updates
    progress = (update - warmup_updates) / (updates - warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


torch.manual_seed(0)
model = VisionTransformer().to(device)
optimizer = torch.optim.AdamW(param_groups_layer_decay(model), lr=lr, weight_decay=weight_decay)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
start_epoch = 0
if checkpoint and checkpoint.exists():
    saved = torch.load(checkpoint, map_location=device)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    ema.load_state_dict(saved["ema"])
    start_epoch = saved["epoch"]

for epoch in range(start_epoch, epochs):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).to(device)
    for batch in order.split(batch_size):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        ema.update_parameters(model)
    with torch.no_grad():
        logits = ema(test_images)
    test_loss = F.cross_entropy(logits, test_labels).item()
    accuracy = (logits.argmax(1) == test_labels).float().mean().item()
    print(f"epoch {epoch + 1}: loss of the EMA {test_loss:.4f}, accuracy {accuracy:.1%}", flush=True)
    if not checkpoint:
        continue
    saved = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "ema": ema.state_dict(),
        "epoch": epoch + 1,
    }
    torch.save(saved, checkpoint.with_suffix(".new"))
    os.replace(checkpoint.with_suffix(".new"), checkpoint)  # whole, or not at all
