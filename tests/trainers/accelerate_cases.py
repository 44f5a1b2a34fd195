"""What the tests of Hugging Face accelerate train, beside float64 torch; and accelerate itself, made new for each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from distributed_cases import SCHEDULE, Net, batch, loss_of, train_alone
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training.schedulers import WSDScheduler

ROWS = 12  # of a batch
UPDATES = 30
DRIVERS = ("inside", "nexus", "torch")  # what evaluates the schedule
DECAY = 0.1


@contextlib.contextmanager
def fresh_accelerate(**environment: str) -> Iterator[None]:
    """Accelerate keeps what it is in class attributes, and writes to the environment."""
    with mock.patch.dict(os.environ, environment):
        for when in range(2):
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            if when == 0:
                yield


def make_model(dtype: torch.dtype) -> Net:
    torch.manual_seed(1)
    return Net().to(dtype)


def make_loader(size: int, dtype: torch.dtype, updates: int = UPDATES) -> DataLoader[Any]:
    xs, ys = zip(*(batch(step, dtype) for step in range(updates)), strict=True)
    return DataLoader(TensorDataset(torch.cat(xs), torch.cat(ys)), batch_size=size)


def make_optimizer(
    model: torch.nn.Module, driver: str, *, lengthened: int = 1, **options: Any
) -> tuple[FusedAdamW, Any]:
    """The optimizer and its scheduler, if any. The scheduler's phases may be lengthened."""
    if driver == "inside":
        return FusedAdamW(model.parameters(), lr=SCHEDULE, weight_decay=DECAY, **options), None
    phases = {
        f"{name}_steps": lengthened * getattr(SCHEDULE, f"{name}_steps") for name in ("warmup", "stable", "decay")
    }
    schedule = WSD(**phases, peak_lr=SCHEDULE.peak_lr, min_lr=SCHEDULE.min_lr)
    optimizer = FusedAdamW(model.parameters(), lr=1.0, weight_decay=DECAY, **options)
    if driver == "torch":
        return optimizer, LambdaLR(optimizer, schedule)
    return optimizer, WSDScheduler(optimizer, **phases, peak_lr=schedule.peak_lr, min_lr=schedule.min_lr)


def prepare(accelerator: Accelerator, *parts: Any) -> tuple[Any, ...]:
    """Of parts of which some are None."""
    prepared = iter(accelerator.prepare(*(part for part in parts if part is not None)))
    return tuple(None if part is None else next(prepared) for part in parts)


def train(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, scheduler: Any, max_norm: float | None = None
) -> list[float]:
    """A loop as accelerate's documentation has it. Returns the rate of every update, read where it was used."""
    inner, rates = optimizer.optimizer, []
    handle = inner.register_step_post_hook(lambda *_: rates.append(float(inner.param_groups[0]["lr"])))
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x, y))
            if accelerator.sync_gradients and max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    handle.remove()
    return rates


def trained_without(max_grad_norm: float | None, updates: int = UPDATES) -> list[Tensor]:
    """The parameters after float64 torch alone: one process, whole batches, no accelerate."""
    alone = make_model(torch.float64)
    train_alone(alone, updates, lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=max_grad_norm)
    return [param.detach() for param in alone.parameters()]


def assert_trained(model: torch.nn.Module, expected: list[Tensor]) -> None:
    for param, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.detach(), value, rtol=1e-10, atol=1e-10)  # as under DDP


def accelerator_with_a_scaler(**options: Any) -> Accelerator:
    """Accelerate has a scaler only on accelerators. What it then sets, it uses on the CPU as well."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", **options)
    assert accelerator.scaler is None
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    return accelerator
