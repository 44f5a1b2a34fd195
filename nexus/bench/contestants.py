"""Optimizers over tensors of their own with the same values, each with one call that does a job of a case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nexus.backends.native import NAME as NATIVE
from nexus.backends.native import NativeRunner
from nexus.bench.cases import CLIP_STEP_SCHEDULE, FOR_LOOP, FOREACH, FUSED, STEP, Case, Shape
from nexus.optim import FusedAdamW
from nexus.schedules import WSD

PEAK_LR = 1e-3
WARMUP_STEPS = 100
MAX_DRAWN = 1 << 18  # random numbers of a tensor
MAX_GRAD_NORM = 1.0  # below the norm of every case's gradients, so that all are clipped
SCHEDULE = WSD(WARMUP_STEPS, None, 1, PEAK_LR)

_HOW: dict[str, dict[str, Any]] = {
    FUSED: {"fused": True},
    FOREACH: {"foreach": True},
    FOR_LOOP: {"foreach": False, "fused": False},
}


@dataclass
class Contestant:
    """Something to be timed."""

    call: Callable[[], object]
    params: list[Tensor]
    first_before: Tensor  # the first parameter as it was
    traffic: Callable[[], object] | None = None  # the loads and stores of a step alone, after a first `call`


def warmup(step: int, scale: float = 1.0) -> float:
    """The factor that torch's schedulers multiply a base rate of `PEAK_LR` by; `SCHEDULE` says the same."""
    return scale * min(1.0, step / WARMUP_STEPS)


def make_params(shapes: tuple[Shape, ...]) -> list[Tensor]:
    """Parameters with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    params = [0.02 * _noise(shape, generator) for shape in shapes]
    for param in params:
        param.grad = 0.1 * _noise(param.shape, generator)
    return params


def _noise(shape: Shape, generator: torch.Generator) -> Tensor:
    """Normally distributed, and over again where it is long: drawing every number would take most of a run."""
    numel = math.prod(shape)
    drawn = torch.randn(min(numel, MAX_DRAWN), generator=generator)
    return drawn.repeat(-(-numel // MAX_DRAWN))[:numel].view(shape)


def rate_scale(index: int, groups: int) -> float:
    """Of group `index`: from 0.5 to 1.5."""
    return 0.5 + index / (groups - 1) if groups > 1 else 1.0


def nexus_optimizer(case: Case, job: str, params: list[Tensor]) -> FusedAdamW:
    """One whose `step` does the whole job."""
    clip = MAX_GRAD_NORM if job == CLIP_STEP_SCHEDULE else None
    if job == STEP:
        return FusedAdamW(params, lr=PEAK_LR, max_grad_norm=clip)
    groups = [
        {"params": part, "lr": rate_scale(i, case.groups) * SCHEDULE}
        for i, part in enumerate(_dealt(params, case.groups))
    ]
    return FusedAdamW(groups, max_grad_norm=clip)


def nexus(case: Case, job: str) -> Contestant:
    """The optimizer of this package."""
    params = make_params(case.shapes)
    optimizer = nexus_optimizer(case, job, params)

    def traffic() -> None:
        runner = optimizer._runner
        assert isinstance(runner, NativeRunner)
        runner._list.traffic(torch.get_num_threads())

    native = optimizer.backend == NATIVE
    return Contestant(optimizer.step, params, params[0].clone(), traffic if native else None)


def peer(case: Case, job: str, name: str) -> Contestant:
    """`torch.optim.AdamW`, run in the way that `name` says, with what the usual training loop calls around it."""
    params = make_params(case.shapes)
    groups = [{"params": part} for part in _dealt(params, case.groups)]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR, **_HOW[name])
    first_before = params[0].clone()
    if job == STEP:
        return Contestant(optimizer.step, params, first_before)
    scheduler = LambdaLR(optimizer, factors(case.groups))
    clips = job == CLIP_STEP_SCHEDULE

    def call() -> None:
        if clips:
            torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()

    return Contestant(call, params, first_before)


def factors(groups: int) -> list[Callable[[int], float]]:
    """What `LambdaLR` takes: a function of the step for each group."""
    return [partial(warmup, scale=rate_scale(i, groups)) for i in range(groups)]


def difference(a: Contestant, b: Contestant) -> float:
    """The largest difference between two contestants' parameters, as a share of the way that these have gone."""
    way = (b.params[0] - b.first_before).abs().max()
    largest = max((x - y).abs().max() for x, y in zip(a.params, b.params, strict=True))
    return float(largest / way)


def _dealt(params: list[Tensor], groups: int) -> list[list[Tensor]]:
    return [params[i::groups] for i in range(groups)]
