"""What the optimizer costs in a training step, beside torch's own, in one process and in turns."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gpt.model import GPT
from gpt.train import BETAS, MAX_GRAD_NORM, Training, make_optimizer, parameter_groups
from nexus.schedules import Schedule

WARMUP = 4  # rounds that are not counted: threads and caches are cold, state is being allocated


@dataclass(frozen=True)
class StepCost:
    """Medians, in seconds: forward and backward, then clip + schedule + update by nexus and by torch."""

    forward_backward: float
    nexus: float
    torch: float

    def share(self, update: float) -> float:
        """The part of a step that `update` seconds are."""
        return update / (self.forward_backward + update)


def torch_update(model: GPT, schedule: Schedule) -> Callable[[], None]:
    """The usual loop's three calls, with torch's fastest AdamW."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1.0, betas=BETAS, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()

    return update


def time_step(training: Training) -> StepCost:
    """Train two copies of the model on the same batches, one by each optimizer, and take the medians.

    Each copy computes its own gradients, so each update is timed as it happens in training, right after a
    backward pass; who goes first alternates. The copies stay equal up to rounding, and so do their gradients.
    """
    schedule = training.config.schedule
    models = [copy.deepcopy(training.model) for _ in range(2)]
    updates = [make_optimizer(models[0], schedule).step, torch_update(models[1], schedule)]
    compute: list[float] = []
    update: tuple[list[float], list[float]] = ([], [])  # of nexus, of torch
    for round_ in range(WARMUP + training.config.size.timed_steps):
        batch = training.batch(round_)
        for i in (0, 1) if round_ % 2 else (1, 0):
            seconds = _seconds(training, partial(_backward, models[i], batch)), _seconds(training, updates[i])
            if round_ >= WARMUP:
                compute.append(seconds[0])
                update[i].append(seconds[1])
    return StepCost(*(statistics.median(times) for times in (compute, *update)))


def _backward(model: GPT, batch: tuple[Tensor, Tensor]) -> None:
    model.zero_grad()
    model.loss(*batch).backward()  # type: ignore[no-untyped-call]


def _seconds(training: Training, call: Callable[[], object]) -> float:
    _synchronize(training)
    started = time.perf_counter()
    call()
    _synchronize(training)
    return time.perf_counter() - started


def _synchronize(training: Training) -> None:
    if training.config.device == "cuda":
        torch.cuda.synchronize()
