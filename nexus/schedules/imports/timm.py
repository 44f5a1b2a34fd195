"""Schedules of timm's scheduler objects."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nexus.arguments import check_count
from nexus.schedules.arc import Arc
from nexus.schedules.base import Schedule
from nexus.schedules.compose import join
from nexus.schedules.constant import Constant
from nexus.schedules.curves import MAX_SAMPLES
from nexus.schedules.exponential import MultiStep
from nexus.schedules.imports.proof import NotImportable, followed, metric_driven, prove, steps_to_prove
from nexus.schedules.linear import Linear

Scheduler = Any
MAX_CYCLES = 10_000
LONGEST = 2**53


def from_timm(scheduler: Scheduler, *, steps: int | None = None, exact: bool = False) -> list[Schedule]:
    """The schedules of a timm scheduler, one a param group, in the clock of the scheduler's `step(t)`.

    timm's clock counts epochs, or updates with `t_in_epochs=False`; so does the step of the schedules here.

    Args:
        scheduler: a `CosineLRScheduler`, `StepLRScheduler`, `MultiStepLRScheduler`, `TanhLRScheduler`,
            `PolyLRScheduler` or `WSDLRScheduler`, new or in mid-run; it is left as it is.
        steps: how many steps to prove, and the length of a table; by default the schedule's length and a tenth.
        exact: follow the object, with its noise and rounding, by a table of its rates for `steps` steps.

    Raises:
        NotImportable: a metric-driven scheduler, an unknown class, noise, or a table without `steps`.
        ImportMismatch: some rate differs by more than 1e-11 relative plus 1e-15 of the peak.
    """
    name = type(scheduler).__name__
    if name == "PlateauLRScheduler":
        raise metric_driven(name)
    if name not in BUILDERS or not type(scheduler).__module__.startswith("timm."):
        raise NotImportable(
            f"scheduler must be one of timm's {', '.join(BUILDERS)}, got {name}; "
            "Schedule.from_function(fn, steps) makes a table of any function of the step"
        )
    if steps is not None:
        steps = check_count("steps", steps, low=1, high=MAX_SAMPLES - 1)
    if exact and steps is not None:
        return followed(real_rates(scheduler, steps))
    if exact or scheduler.noise_range_t is not None:
        raise NotImportable(f"{name} with noise, or exact=True, is imported by a table: give steps= and exact=True")
    schedules = []
    for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_values, strict=True):
        schedule = _after_warmup(scheduler, float(base))
        scale = float(group.get("lr_scale", 1.0))
        schedules.append(schedule if scale == 1.0 else scale * schedule)
    prove(schedules, real_rates(scheduler, steps_to_prove(schedules, steps)), name)
    return schedules


def real_rates(scheduler: Scheduler, steps: int) -> Iterator[list[float]]:
    """The rates at the times 0 to `steps` of a copy of the scheduler on a throwaway optimizer."""
    scales = [
        {"lr_scale": each["lr_scale"]} if "lr_scale" in each else {} for each in scheduler.optimizer.param_groups
    ]
    groups = [{"params": [torch.zeros(1)], "lr": 1.0, **scale} for scale in scales]
    twin = copy.copy(scheduler)
    twin.optimizer = torch.optim.SGD(groups, lr=1.0)
    step = twin.step if twin.t_in_epochs else twin.step_update
    for t in range(steps + 1):
        step(t)
        yield [float(group["lr"]) for group in twin.optimizer.param_groups]


def _after_warmup(s: Scheduler, lr: float) -> Schedule:
    """The warm-up, a line, and what timm computes after it: on its own clock with `warmup_prefix`, else on t."""
    warmup = int(s.warmup_t)
    is_prefix = getattr(s, "warmup_prefix", True)  # which a WSDLRScheduler always has
    gone = 0 if is_prefix else warmup
    body = BUILDERS[type(s).__name__](s, lr, gone)
    if warmup == 0:
        return body
    is_met = type(s).__name__ == "TanhLRScheduler" and not is_prefix
    return join(
        [Linear(start_lr=s.warmup_lr_init, end_lr=body(0) if is_met else lr, total_steps=warmup), body], [warmup]
    )


def _step(s: Scheduler, lr: float, gone: int) -> Schedule:
    return Arc("staircase", high=lr, low=0.0, span=float(s.decay_t), shift=float(gone), q=s.decay_rate)


def _multi_step(s: Scheduler, lr: float, gone: int) -> Schedule:
    return MultiStep(
        peak_lr=lr, milestones=tuple(max(0, int(each) - 1 - gone) for each in s.decay_t), gamma=s.decay_rate
    )


def _cosine(s: Scheduler, lr: float, gone: int) -> Schedule:
    return _cycles(
        s,
        gone,
        lambda i, span, shift: Arc(
            "cosine", high=lr * s.cycle_decay**i, low=s.lr_min, span=span, shift=shift, k=s.k_decay
        ),
    )


def _poly(s: Scheduler, lr: float, gone: int) -> Schedule:
    return _cycles(
        s,
        gone,
        lambda i, span, shift: Arc(
            "power", high=lr * s.cycle_decay**i, low=s.lr_min, span=span, shift=shift, k=s.k_decay, q=s.power
        ),
    )


def _tanh(s: Scheduler, lr: float, gone: int) -> Schedule:
    return _cycles(
        s,
        gone,
        lambda i, span, shift: Arc(
            "tanh", high=lr * s.cycle_decay**i, low=s.lr_min, span=span, shift=shift, k=s.lb, q=s.ub
        ),
    )


def _wsd(s: Scheduler, lr: float, gone: int) -> Schedule:
    stable, least = int(s.t_initial) - int(s.decay_t), float(s.lr_min)
    if callable(s.decay_fn) or (s.stable_fn != "constant" and least > 0.0):
        unknown = "a decay_fn of your own" if callable(s.decay_fn) else f"stable_fn={s.stable_fn!r} and an lr_min"
        raise NotImportable(f"WSDLRScheduler with {unknown} is imported by a table: give steps= and exact=True")
    if s.stable_fn == "constant":
        return join([Constant(lr), _wsd_decay(s, lr, least)], [stable])
    power = 0.5 if s.stable_fn == "rsqrt" else s.stable_power
    falling = Arc("inverse", high=lr, low=0.0, span=float(s.stable_timescale), q=power)
    return falling * join([Constant(1.0), _wsd_decay(s, 1.0, 0.0)], [stable])


def _wsd_decay(s: Scheduler, high: float, low: float) -> Schedule:
    curves = {
        "linear": ("linear", 1.0, 1.0),
        "cosine": ("cosine", 1.0, 1.0),
        "1-sqrt": ("sqrt", 1.0, 1.0),
        "power": ("power", s.decay_power, 1.0),
        "exp": ("exponential", s.decay_ratio, s.decay_ratio),
    }
    curve, k, q = curves[s.decay_fn]
    return join([Arc(curve, high=high, low=low, span=float(s.decay_t), k=k, q=q), Constant(low)], [int(s.decay_t)])


BUILDERS: dict[str, Callable[[Scheduler, float, int], Schedule]] = {
    "CosineLRScheduler": _cosine,
    "StepLRScheduler": _step,
    "MultiStepLRScheduler": _multi_step,
    "TanhLRScheduler": _tanh,
    "PolyLRScheduler": _poly,
    "WSDLRScheduler": _wsd,
}


def _cycles(s: Scheduler, gone: int, arc: Callable[[int, float, float], Schedule]) -> Schedule:
    """An arc for each cycle that is left when `gone` steps have gone by, and then the least rate."""
    arcs: list[Schedule] = []
    starts: list[int] = []
    begin, span = 0.0, float(s.t_initial)
    for cycle in range(s.cycle_limit):
        if cycle == MAX_CYCLES or begin > LONGEST:
            break
        start, end = max(gone, math.ceil(begin)), math.ceil(begin + span)
        if start < end:
            arcs.append(arc(cycle, span, start - begin))
            starts.append(start - gone)
        begin, span = begin + span, span * s.cycle_mul
    else:
        arcs.append(Constant(s.lr_min))
        starts.append(max(0, math.ceil(begin) - gone))
    return join(arcs, starts[1:])
