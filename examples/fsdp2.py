"""Trains the demo's GPT under FSDP2, stops, and goes on with another number of processes, as if nothing had happened.

torchrun --nproc-per-node 3 examples/fsdp2.py --stop 30
torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nexus.demo import corpus
from nexus.demo.model import GPT, GPTConfig
from nexus.optim import FusedAdamW
from nexus.schedules import WSD

STEPS, BATCH = 60, 12  # sequences of all processes together; their number divides it


def train(stop: int, checkpoint: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    rank, processes = mesh.get_rank(), mesh.size()

    torch.manual_seed(0)  # the same model everywhere, before it is sharded
    model = GPT(GPTConfig(layers=2, width=64, context=64)).to(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    schedule = WSD(warmup_steps=10, stable_steps=30, decay_steps=20, peak_lr=5e-3)
    optimizer = FusedAdamW(model.parameters(), lr=schedule, weight_decay=0.1, max_grad_norm=1.0)  # as in one process

    step = 0
    if (checkpoint / ".metadata").is_file():
        saved = state(model, optimizer, step)
        dcp.load(saved, checkpoint_id=checkpoint)  # each process reads its own part, however it was saved
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        step = saved["step"]

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
    if step < STEPS:
        dcp.save(state(model, optimizer, step), checkpoint_id=checkpoint)


def state(model: GPT, optimizer: FusedAdamW, step: int) -> dict[str, object]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {"model": of_model, "optimizer": of_optimizer, "step": step}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stop", type=int, default=STEPS, help="save and stop after this many steps")
    parser.add_argument("--checkpoint", type=Path, default="build/fsdp2", help="gone on from, if it is there")
    arguments = parser.parse_args()
    train(arguments.stop, arguments.checkpoint)
    gc.collect()  # a sharded model that is left to the interpreter's end can make gloo abort, its work done
    dist.destroy_process_group()
