"""Schedules of the objects of torch.optim.lr_scheduler."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler as theirs

from nexus.arguments import check_count
from nexus.schedules.arc import Arc
from nexus.schedules.base import Schedule
from nexus.schedules.compose import join
from nexus.schedules.constant import Constant
from nexus.schedules.cosine import CosineRestarts
from nexus.schedules.curves import MAX_SAMPLES
from nexus.schedules.cyclic import Cyclic, OneCycle
from nexus.schedules.exponential import Exponential, MultiStep, StepDecay
from nexus.schedules.imports import lambdas, plateaus
from nexus.schedules.imports.proof import NotImportable, followed, metric_driven, prove, steps_to_prove
from nexus.schedules.linear import Linear
from nexus.schedules.powers import Polynomial

Scheduler = Any  # torch's classes keep most of their numbers in untyped attributes


def from_torch(scheduler: Scheduler, *, steps: int | None = None, exact: bool = False) -> list[Schedule]:
    """The schedules of a scheduler of `torch.optim.lr_scheduler`, one a param group.

    The scheduler may be new or in mid-run: the schedules are those from its own step 0 on, so that
    `schedules[i](scheduler.last_epoch)` is the present rate of group i. The scheduler is left as it is.

    Of `OneCycleLR` and `CyclicLR`, these are the rates; `betas_from_torch` has the betas that they cycle.
    Of a `ReduceLROnPlateau`, each schedule is a `ReduceOnPlateau` over the present rate, which has heard nothing;
    `FusedAdamW.take_over` goes on from what the scheduler has heard.
    A `LambdaLR` of transformers' or torchtitan's functions is imported by what they are; of any other, by a table of
    its rates.

    Args:
        scheduler: an object of exactly one of torch's classes.
        steps: how many steps to prove, and the length of a table; by default the schedule's length and a tenth, at
            most 20,000, and 2,000 where it has no end.
        exact: follow the object, with its rounding, by a table of its rates for `steps` steps.

    Raises:
        NotImportable: a metric-driven part of a scheduler, an unknown class, or a table without `steps`.
        TypeError, ValueError: a number that no schedule takes, such as a `gamma` of 0.
        ImportMismatch: some rate differs by more than 1e-11 relative plus 1e-15 of the peak.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    >>> from_torch(torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.5))
    [StepDecay(peak_lr=1.0, gamma=0.5, every=10, min_lr=0.0)]
    """
    name = type(scheduler).__name__
    if type(scheduler) is theirs.ReduceLROnPlateau:
        return [*plateaus.plateaus_of(scheduler, exact=exact)]
    if steps is not None:
        steps = check_count("steps", steps, low=1, high=MAX_SAMPLES - 1)
    if _is_opaque(scheduler) or exact:
        if steps is None:
            why = "exact=True" if exact else "a function of unknown formula"
            raise NotImportable(f"{name} is imported by a table ({why}): give steps=, how many updates it is to hold")
        _check_class(scheduler)
        return followed(real_rates(scheduler, min(steps, last_step(scheduler))))
    _check_class(scheduler)
    schedules = [schedule_of(scheduler, group) for group in range(len(scheduler.optimizer.param_groups))]
    count = steps_to_prove(schedules, steps)
    peaks = prove(schedules, real_rates(scheduler, min(count, last_step(scheduler))), name)
    now = [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    prove(schedules, [now], f"the optimizer of the {name}, as it is now,", first=step_of(scheduler), peaks=peaks)
    return schedules


def schedule_of(scheduler: Scheduler, group: int, factor: float | None = None) -> Schedule:
    """The schedule of one group, without a proof; of a rate of 1 times `factor` where that is given."""
    lr = float(scheduler.base_lrs[group]) if factor is None and hasattr(scheduler, "base_lrs") else factor
    is_in_proportion = type(scheduler) not in RATES_OF_THEIR_OWN and not getattr(scheduler, "eta_min", 0.0)
    if lr == 0.0 and is_in_proportion:
        return Constant(0.0)
    return BUILDERS[type(scheduler)](scheduler, lr, group)


def _linear(s: Scheduler, lr: float, group: int) -> Schedule:
    if s.total_iters <= 0:
        return Constant(lr * s.start_factor)
    return Linear(start_lr=lr * s.start_factor, end_lr=lr * s.end_factor, total_steps=s.total_iters)


def _constant(s: Scheduler, lr: float, group: int) -> Schedule:
    if s.total_iters <= 0:
        return Constant(lr * s.factor)
    return join([Constant(lr * s.factor), Constant(lr)], [s.total_iters])


def _step(s: Scheduler, lr: float, group: int) -> Schedule:
    return StepDecay(peak_lr=lr, gamma=s.gamma, every=s.step_size)


def _multi_step(s: Scheduler, lr: float, group: int) -> Schedule:
    return MultiStep(
        peak_lr=lr, milestones=tuple(sorted(each for each in s.milestones.elements() if each >= 0)), gamma=s.gamma
    )


def _exponential(s: Scheduler, lr: float, group: int) -> Schedule:
    return Exponential(peak_lr=lr, gamma=s.gamma)


def _polynomial(s: Scheduler, lr: float, group: int) -> Schedule:
    if s.total_iters <= 0:
        return Constant(lr)
    return Polynomial(peak_lr=lr, total_steps=s.total_iters, power=s.power)


def _cosine(s: Scheduler, lr: float, group: int) -> Schedule:
    return Arc("cosine", high=lr, low=float(s.eta_min), span=float(s.T_max))


def _warm_restarts(s: Scheduler, lr: float, group: int) -> Schedule:
    return CosineRestarts(
        warmup_steps=0, cycle_length=s.T_0, cycle_mult=float(s.T_mult), peak_lr=lr, min_lr=float(s.eta_min)
    )


def _one_cycle(s: Scheduler, lr: float, group: int) -> Schedule:
    numbers = s.optimizer.param_groups[group]
    peak, phases = float(numbers["max_lr"]), s._schedule_phases
    return OneCycle(
        peak_lr=peak,
        total_steps=s.total_steps,
        up_fraction=(phases[0]["end_step"] + 1) / s.total_steps,
        start_factor=float(numbers["initial_lr"]) / peak,
        end_factor=float(numbers["min_lr"]) / peak,
        kind={"cos": "cosine"}.get(s._anneal_func_type, s._anneal_func_type),
        three_phase=len(phases) == 3,
    )


def _cyclic(s: Scheduler, lr: float, group: int) -> Schedule:
    if s._scale_fn_custom is not None:
        raise NotImportable("CyclicLR with a scale_fn has an unknown formula: give steps= and exact=True for a table")
    up = round(s.total_size * s.step_ratio)
    return Cyclic(
        base_lr=lr,
        peak_lr=float(s.max_lrs[group]),
        up_steps=up,
        down_steps=round(s.total_size) - up,
        mode=s.mode,
        gamma=s.gamma,
    )


def _lambda(s: Scheduler, lr: float, group: int) -> Schedule:
    known = lambdas.schedule_of(s.lr_lambdas[group], lr)
    if known is None:
        raise NotImportable("LambdaLR has a function of unknown formula: give steps= for a table of its rates")
    return known


def _sequential(s: Scheduler, lr: float | None, group: int) -> Schedule:
    return join([schedule_of(each, group, lr) for each in s._schedulers], s._milestones)


def _chained(s: Scheduler, lr: float | None, group: int) -> Schedule:
    first, *others = s._schedulers
    product = schedule_of(first, group, lr)
    for each in others:
        product = product * schedule_of(each, group, 1.0)
    return product


BUILDERS: dict[type, Callable[[Scheduler, Any, int], Schedule]] = {
    theirs.LinearLR: _linear,
    theirs.ConstantLR: _constant,
    theirs.StepLR: _step,
    theirs.MultiStepLR: _multi_step,
    theirs.ExponentialLR: _exponential,
    theirs.PolynomialLR: _polynomial,
    theirs.CosineAnnealingLR: _cosine,
    theirs.CosineAnnealingWarmRestarts: _warm_restarts,
    theirs.OneCycleLR: _one_cycle,
    theirs.CyclicLR: _cyclic,
    theirs.LambdaLR: _lambda,
    theirs.MultiplicativeLR: _lambda,
    theirs.SequentialLR: _sequential,
    theirs.ChainedScheduler: _chained,
}

RATES_OF_THEIR_OWN = (theirs.CyclicLR, theirs.OneCycleLR)
"""Whose rates are not the optimizer's own, times a factor."""

ARGUMENTS: dict[type, tuple[str, ...]] = {
    theirs.LinearLR: ("start_factor", "end_factor", "total_iters"),
    theirs.ConstantLR: ("factor", "total_iters"),
    theirs.StepLR: ("step_size", "gamma"),
    theirs.ExponentialLR: ("gamma",),
    theirs.PolynomialLR: ("total_iters", "power"),
    theirs.CosineAnnealingLR: ("T_max", "eta_min"),
    theirs.CosineAnnealingWarmRestarts: ("T_0", "T_mult", "eta_min"),
}
"""The constructor's arguments that the object keeps by the same names."""


def real_rates(scheduler: Scheduler, steps: int) -> Iterator[list[float]]:
    """The rates of steps 0 to `steps` of a copy of the scheduler, one for each group, on a throwaway optimizer."""
    count = len(scheduler.optimizer.param_groups)
    starts = _first_rates(scheduler)
    groups = [{"params": [torch.zeros(1)], "lr": starts[i]} for i in range(count)]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    optimizer.step()
    copy = quietly(lambda: rebuilt(scheduler, optimizer))
    for step in range(steps + 1):
        if step:
            quietly(copy.step)
        yield [float(group["lr"]) for group in optimizer.param_groups]


def quietly(call: Callable[[], Any]) -> Any:
    """Without torch's warnings on the order of calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call()


def step_of(scheduler: Scheduler) -> int:
    """The step that a scheduler is at; of a `ChainedScheduler`, that of its parts."""
    while not hasattr(scheduler, "last_epoch"):
        scheduler = scheduler._schedulers[0]
    return int(scheduler.last_epoch)


def _first_rates(scheduler: Scheduler) -> list[float]:
    inner = scheduler
    while hasattr(inner, "_schedulers"):
        inner = inner._schedulers[0]
    return [float(lr) for lr in inner.base_lrs]


def rebuilt(s: Scheduler, optimizer: torch.optim.Optimizer, *, cycles_momentum: bool = False) -> Scheduler:
    """A new scheduler of the same arguments on another optimizer, whose momenta it cycles if `cycles_momentum`."""
    kind = type(s)
    cycles: dict[str, Any] = {"cycle_momentum": cycles_momentum}
    if cycles_momentum:
        groups = s.optimizer.param_groups
        cycles |= {name: [group[name] for group in groups] for name in ("base_momentum", "max_momentum")}
    if kind in ARGUMENTS:
        return kind(optimizer, **{name: getattr(s, name) for name in ARGUMENTS[kind]})
    if kind is theirs.MultiStepLR:
        return kind(optimizer, list(s.milestones.elements()), s.gamma)
    if kind in (theirs.LambdaLR, theirs.MultiplicativeLR):
        return kind(optimizer, list(s.lr_lambdas))
    if kind is theirs.SequentialLR:
        return kind(optimizer, [rebuilt(each, optimizer) for each in s._schedulers], list(s._milestones))
    if kind is theirs.ChainedScheduler:
        return kind([rebuilt(each, optimizer) for each in s._schedulers], optimizer)
    if kind is theirs.CyclicLR:
        up = s.total_size * s.step_ratio
        numbers = {"mode": s.mode, "gamma": s.gamma, "scale_fn": s._scale_fn_custom, "scale_mode": s.scale_mode}
        sizes = {"step_size_up": up, "step_size_down": s.total_size - up}
        return kind(optimizer, list(s.base_lrs), list(s.max_lrs), **cycles, **sizes, **numbers)
    first, peaks = s.optimizer.param_groups, [group["max_lr"] for group in s.optimizer.param_groups]
    copy = kind(optimizer, peaks, s.total_steps, anneal_strategy=s._anneal_func_type, **cycles)
    copy._schedule_phases = s._schedule_phases
    for ours, group in zip(optimizer.param_groups, first, strict=True):
        ours.update(initial_lr=group["initial_lr"], max_lr=group["max_lr"], min_lr=group["min_lr"])
    copy.last_epoch = -1
    copy._initial_step()
    return copy


def _check_class(scheduler: Scheduler) -> None:
    if type(scheduler) is theirs.ReduceLROnPlateau:
        raise metric_driven("ReduceLROnPlateau")
    if type(scheduler) not in BUILDERS:
        allowed = ", ".join(each.__name__ for each in BUILDERS)
        raise NotImportable(
            f"scheduler must be an object of exactly one of {allowed}, got {type(scheduler).__name__}; "
            "Schedule.from_function(fn, steps) makes a table of any function of the step"
        )
    for each in getattr(scheduler, "_schedulers", ()):
        _check_class(each)


def _is_opaque(scheduler: Scheduler) -> bool:
    """Whether the rates are known only by calling a function."""
    if hasattr(scheduler, "_schedulers"):
        return any(map(_is_opaque, scheduler._schedulers))
    if type(scheduler) is theirs.MultiplicativeLR:
        return True
    return type(scheduler) is theirs.LambdaLR and any(
        lambdas.schedule_of(fn, 1.0) is None for fn in scheduler.lr_lambdas
    )


def last_step(scheduler: Scheduler) -> int:
    """The last step that the object can make."""
    if type(scheduler) is theirs.OneCycleLR:
        return int(scheduler.total_steps) - 1
    if type(scheduler) is theirs.SequentialLR:
        return int(([0, *scheduler._milestones])[-1]) + last_step(scheduler._schedulers[-1])
    if type(scheduler) is theirs.LambdaLR:
        ends = [lambdas.last_step(fn) for fn in scheduler.lr_lambdas]
        return min((end for end in ends if end is not None), default=2**53)
    inner: Sequence[Scheduler] = getattr(scheduler, "_schedulers", ())
    return min(map(last_step, inner), default=2**53)
