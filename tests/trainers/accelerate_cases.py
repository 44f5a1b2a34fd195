"""What the tests of Hugging Face accelerate train, beside float64 torch; and accelerate itself, made new for each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from distributed_cases import SCHEDULE, batch, loss_of, make_net, train_alone, whole
from references import Float64AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training.schedulers import WSDScheduler

ROWS = 12  # of a batch
UPDATES = 30
RATES = [SCHEDULE(t) for t in range(UPDATES)]
DECAY, CLIP = 0.1, 0.7


@contextlib.contextmanager
def fresh_accelerate(**environment: str) -> Iterator[None]:
    """Accelerate keeps what it is in class attributes, and writes to the environment."""
    with mock.patch.dict(os.environ, environment):
        for when in range(2):
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            if when == 0:
                yield


@contextlib.contextmanager
def in_this_world() -> Iterator[None]:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    with fresh_accelerate(**names, OMP_NUM_THREADS="1"):
        yield


def make_optimizer(
    model: torch.nn.Module, driver: str, *, lengthened: int = 1, **options: Any
) -> tuple[FusedAdamW, Any]:
    """The optimizer, and the scheduler that drives it, if any. The scheduler's phases may be lengthened."""
    if driver == "inside":
        return FusedAdamW(model.parameters(), lr=SCHEDULE, weight_decay=DECAY, **options), None
    optimizer = FusedAdamW(model.parameters(), lr=1.0, weight_decay=DECAY, **options)
    phases = {name: lengthened * getattr(SCHEDULE, name) for name in ("warmup_steps", "stable_steps", "decay_steps")}
    make: Any = {
        "nothing": lambda *_, **__: None,
        "nexus": WSDScheduler,
        "torch": lambda optimizer, **arguments: LambdaLR(optimizer, WSD(**arguments)),
    }[driver]
    return optimizer, make(optimizer, **phases, peak_lr=SCHEDULE.peak_lr, min_lr=SCHEDULE.min_lr)


def accelerator_with_a_scaler(**options: Any) -> Accelerator:
    """Accelerate has a scaler only on accelerators. What it then sets, it uses on the CPU as well."""
    accelerator = Accelerator(cpu=True, mixed_precision="fp16", **options)
    assert accelerator.scaler is None
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    return accelerator


class Run:
    """A loop as accelerate's documentation has it, beside float64 torch on the same gradients.

    Args:
        accelerator: that prepares everything.
        driver: what evaluates the schedule: "inside", "nexus", "torch" or "nothing".
        dtype: of the model.
        rows: of each process's batch.
        clips: "ours" or "accelerate's"; both clip to the same norm.
        updates: how many there are batches for.
        options: for `make_optimizer`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        driver: str,
        dtype: torch.dtype = torch.float32,
        *,
        rows: int = ROWS,
        clips: str = "ours",
        updates: int = UPDATES,
        **options: Any,
    ) -> None:
        model = make_net(dtype)
        self.accelerator, self.clips_itself = accelerator, clips == "ours"
        self.own, scheduler = make_optimizer(
            model, driver, max_grad_norm=CLIP if self.clips_itself else None, **options
        )
        amsgrad = options.get("amsgrad", False)
        self.reference = Float64AdamW(
            list(model.parameters()), lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=CLIP, amsgrad=amsgrad
        )
        xs, ys = zip(*(batch(step, dtype) for step in range(updates)), strict=True)
        loader = DataLoader(TensorDataset(torch.cat(xs), torch.cat(ys)), batch_size=rows)
        parts = [model, self.own, loader] if scheduler is None else [model, self.own, loader, scheduler]
        self.model, self.optimizer, self.loader, *rest = accelerator.prepare(*parts)
        self.scheduler = rest[0] if rest else None
        self.rates: list[float] = []

    def updates(self, batches: Iterable[Any] | None = None, overflows: Collection[int] = ()) -> Iterator[bool]:
        """Train, and tell after each update whether its gradients, of all processes, have overflowed.

        Args:
            batches: those of the loader, if not given.
            overflows: the updates whose last loss is too large in this process.
        """
        number = 0
        for x, y in self.loader if batches is None else batches:
            with self.accelerator.accumulate(self.model):
                last = self.accelerator.sync_gradients
                too_large = last and number in overflows
                self.accelerator.backward(loss_of(self.model, x * 1e6 if too_large else x, y))
                overflowed = last and not self.finish_gradients()
                self.optimizer.step()
                if last and not overflowed:
                    self.rates.append(self.rate())
                if self.scheduler is not None:
                    self.scheduler.step()
                self.optimizer.zero_grad()
            if last:
                yield overflowed
                number += 1

    def finish_gradients(self) -> bool:
        """Let the reference make its step, unless there was an overflow, and clip. Returns whether it has."""
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        grads = [whole(param.grad).double() / scale for param in self.model.parameters()]
        finite = all(bool(grad.isfinite().all()) for grad in grads)
        if finite:
            self.reference.step(grads)
        if not self.clips_itself:
            self.accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        return finite

    def rate(self) -> float:
        """The rate that the last step has used, as a user would log it: a scheduler has no tensor for it."""
        used = float(self.own.param_groups[0]["lr"])
        if self.scheduler is not None:
            (logged,) = self.scheduler.get_last_lr()
            assert type(logged) is float
            assert logged == used
        return used

    def train(self, batches: Iterable[Any] | None = None) -> list[float]:
        """The rates of updates of which none overflows."""
        before = len(self.rates)
        assert not any(self.updates(batches))
        return self.rates[before:]


def assert_trained(model: torch.nn.Module, max_grad_norm: float | None = CLIP) -> None:
    """As by float64 torch alone: one process, whole batches, no accelerate."""
    alone = make_net(torch.float64)
    train_alone(alone, UPDATES, lr=SCHEDULE, weight_decay=DECAY, max_grad_norm=max_grad_norm)
    for param, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole(param.detach()), expected.detach(), rtol=1e-10, atol=1e-10)
