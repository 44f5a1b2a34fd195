"""Trains the demo's GPT under FSDP2, stops, and goes on with another number of processes, as if nothing had happened.

Each save has a folder of its own, so a run that is killed while it saves goes on from the save before.

torchrun --nproc-per-node 3 examples/fsdp2.py --stop 30
torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
import gc
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gpt import corpus
from gpt.model import GPT, GPTConfig
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

STEPS, BATCH = 60, 12  # sequences of all processes together; their number divides it


def train(stop: int, checkpoint: Path) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 0))
    if processes == 0 or BATCH % processes:
        command = "torchrun --nproc-per-node 2 examples/fsdp2.py"
        raise SystemExit(f"start this with torchrun, in a number of processes that divides {BATCH}: {command}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (processes,))
    rank = mesh.get_rank()

    torch.manual_seed(0)  # the same model everywhere, before it is sharded
    model = GPT(GPTConfig(layers=2, width=64, context=64)).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    schedule = WSD(warmup_steps=10, stable_steps=30, decay_steps=20, peak_lr=5e-3)
    optimizer = FusedAdamW(model.parameters(), lr=schedule, weight_decay=0.1, max_grad_norm=1.0)  # as in one process

    start = step = 0
    if (newest := newest_of(checkpoint)) is not None:
        saved = state(model, optimizer, step)
        dcp.load(saved, checkpoint_id=newest)  # each process reads its own part, however it was saved
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        start = step = saved["step"]

    text = corpus.load(torch.device(device))
    while step < stop:
        inputs, targets = (rows.chunk(processes)[rank] for rows in text.batch(0, step, BATCH, 64))
        optimizer.zero_grad()
        loss = model.loss(inputs, targets)
        loss.backward()
        optimizer.step()
        step += 1
        if step % 10 == 0:
            mean = loss.detach() / processes
            dist.all_reduce(mean)
            if rank == 0:
                norm, rate = optimizer.grad_norm.item(), optimizer.param_groups[0]["lr"].item()
                print(f"{processes} processes, step {step}: loss {mean.item():.3f}, norm {norm:.3f}, rate {rate:.5f}")
    if start < step < STEPS:
        save(state(model, optimizer, step), checkpoint, rank)


def state(model: GPT, optimizer: FusedAdamW, step: int) -> dict[str, object]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": step}


def newest_of(checkpoint: Path) -> Path | None:
    """The last whole save. What a killed run has left has no .metadata: torch writes it when all else is written."""
    return max((file.parent for file in checkpoint.glob("step-*/.metadata")), default=None)


def save(saved: dict[str, object], checkpoint: Path, rank: int) -> None:
    folder = checkpoint / f"step-{saved['step']:08}"
    dcp.save(saved, checkpoint_id=folder)  # returns when all processes have written, and .metadata is there
    if rank == 0:
        for other in set(checkpoint.glob("step-*")) - {folder}:
            shutil.rmtree(other)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop", type=int, default=STEPS, help="save and stop after this many steps")
    parser.add_argument("--checkpoint", type=Path, default="build/fsdp2", help="a folder; gone on from what is there")
    arguments = parser.parse_args()
    train(arguments.stop, arguments.checkpoint)
    gc.collect()  # a sharded model that is left to the interpreter's end can make gloo abort, its work done
    dist.destroy_process_group()
