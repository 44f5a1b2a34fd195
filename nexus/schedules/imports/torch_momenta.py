"""Schedules of the first betas that schedulers of torch.optim.lr_scheduler cycle inversely to the rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim import lr_scheduler as theirs

from nexus.arguments import check_count
from nexus.schedules.arc import Arc
from nexus.schedules.base import Schedule
from nexus.schedules.compose import join
from nexus.schedules.constant import Constant
from nexus.schedules.curves import MAX_SAMPLES
from nexus.schedules.imports.proof import NotImportable, followed, prove, steps_to_prove
from nexus.schedules.imports.torch_schedulers import Scheduler, last_step, quietly, rebuilt
from nexus.schedules.linear import Linear

CYCLING = (theirs.OneCycleLR, theirs.CyclicLR)


def betas_from_torch(scheduler: Scheduler, *, steps: int | None = None, exact: bool = False) -> list[tuple[Any, Any]]:
    """The betas of a scheduler of `torch.optim.lr_scheduler`, one pair a param group of an optimizer that has betas.

    `OneCycleLR` and `CyclicLR` cycle the first beta, unless they were told `cycle_momentum=False`: it is a schedule
    then, from the scheduler's own step 0 on. The second beta, and the betas under every other scheduler, are those of
    the group. The scheduler is left as it is.

    Args:
        scheduler: an object of one of torch's classes.
        steps: how many steps to prove, and the length of a table; by default as of `from_torch`.
        exact: follow the object, with its rounding, by a table of its betas for `steps` steps.

    Raises:
        NotImportable: the momenta of an optimizer without betas, those of a scheduler within another one, or a table
            without `steps`.
        ImportMismatch: some beta differs by more than 1e-11 relative.

    >>> optimizer = torch.optim.AdamW([torch.zeros(1)], lr=1.0)
    >>> scheduler = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, step_size_up=2)
    >>> [(beta1, beta2)] = betas_from_torch(scheduler)
    >>> [round(beta, 3) for beta in beta1.values(0, 5)], beta2
    ([0.9, 0.85, 0.8, 0.85, 0.9], 0.999)
    """
    name, groups = type(scheduler).__name__, scheduler.optimizer.param_groups
    for each in _within(scheduler):
        if getattr(each, "cycle_momentum", False):
            raise NotImportable(
                f"a {type(each).__name__} within the {name} cycles betas, of which there is no schedule; give it "
                "cycle_momentum=False"
            )
    if not getattr(scheduler, "cycle_momentum", False):
        return [group["betas"] for group in groups]
    if not all("betas" in group for group in groups):
        raise NotImportable(f"the {name} cycles momenta of an optimizer without betas; give it cycle_momentum=False")
    if steps is not None:
        steps = check_count("steps", steps, low=1, high=MAX_SAMPLES - 1)
    if exact or _shrinks(scheduler):
        if steps is None:
            why = "exact=True" if exact else f"mode={scheduler.mode!r}"
            raise NotImportable(
                f"the betas of a {name} are imported by a table ({why}): give steps=, how many updates it is to "
                "hold, or the scheduler cycle_momentum=False"
            )
        schedules = followed(_real_betas(scheduler, min(steps, last_step(scheduler))))
    else:
        build = _one_cycle if type(scheduler) is theirs.OneCycleLR else _cyclic
        schedules = [build(scheduler, index) for index in range(len(groups))]
        count = min(steps_to_prove(schedules, steps), last_step(scheduler))
        prove(schedules, _real_betas(scheduler, count), f"the first beta of {name}")
    return [(schedule, group["betas"][1]) for schedule, group in zip(schedules, groups, strict=True)]


def _within(scheduler: Scheduler) -> Iterator[Scheduler]:
    for each in getattr(scheduler, "_schedulers", ()):
        yield each
        yield from _within(each)


def _shrinks(scheduler: Scheduler) -> bool:
    return type(scheduler) is theirs.CyclicLR and (
        scheduler.mode != "triangular" or scheduler._scale_fn_custom is not None
    )


def _one_cycle(s: Scheduler, group: int) -> Schedule:
    numbers, last = s.optimizer.param_groups[group], s.total_steps - 1
    parts: list[Schedule] = []
    starts: list[int] = []
    begin, first = 0.0, 0
    for phase in s._schedule_phases:
        end = float(phase["end_step"])
        high, low = numbers[phase["start_momentum"]], numbers[phase["end_momentum"]]
        if first <= min(end, last - 1):
            curve = "cosine" if s._anneal_func_type == "cos" else "linear"
            parts.append(Arc(curve, high=high, low=low, span=end - begin, shift=first - begin))
            starts.append(first)
        if last <= end:
            break
        begin, first = end, max(0, math.floor(end) + 1)
    return join([*parts, Constant(low)], [*starts[1:], last]) if parts else Constant(low)


def _cyclic(s: Scheduler, group: int) -> Schedule:
    high, low = float(s.max_momentums[group]), float(s.base_momentums[group])
    up = round(s.total_size * s.step_ratio)
    down = round(s.total_size) - up
    return (
        Linear(start_lr=high, end_lr=low, total_steps=up)
        .then(Linear(start_lr=low, end_lr=high, total_steps=down))
        .repeat()
    )


def _real_betas(scheduler: Scheduler, steps: int) -> Iterator[list[float]]:
    """The first betas of steps 0 to `steps` of a copy of the scheduler, one a group, on a throwaway optimizer."""
    count = len(scheduler.optimizer.param_groups)
    optimizer = torch.optim.AdamW([{"params": [torch.zeros(1)]} for _ in range(count)], lr=1.0)
    optimizer.step()
    copy = quietly(lambda: rebuilt(scheduler, optimizer, cycles_momentum=True))
    for step in range(steps + 1):
        if step:
            quietly(copy.step)
        yield [float(group["betas"][0]) for group in optimizer.param_groups]
