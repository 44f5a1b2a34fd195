"""The linear warm-up that some schedules begin with."""

from __future__ import annotations

from typing import Protocol

from nexus.arguments import check_number
from nexus.schedules.curves import Curve, Segment, between, checked_rates, segment


class Rising(Protocol):
    """A schedule with a warm-up, from `warmup_start_lr` or, where that is None, from `min_lr`."""

    @property
    def warmup_steps(self) -> int: ...
    @property
    def warmup_start_lr(self) -> float | None: ...
    @property
    def peak_lr(self) -> float: ...
    @property
    def min_lr(self) -> float: ...


def first_rate(schedule: Rising) -> float:
    """The rate at step 0 of the warm-up."""
    return schedule.min_lr if schedule.warmup_start_lr is None else schedule.warmup_start_lr


def rising_rate(schedule: Rising, step: int) -> float:
    """The rate at a step of the warm-up."""
    return between(first_rate(schedule), schedule.peak_lr, Curve.RISE, step / schedule.warmup_steps)


def rise(schedule: Rising) -> Segment:
    """The row of the warm-up; where it has no updates, one that is never in force."""
    return segment(Curve.RISE, 0, max(1, schedule.warmup_steps), schedule.peak_lr, first_rate(schedule))


def checked_rising(schedule: Rising) -> dict[str, float]:
    """The rates, as numbers with `min_lr` and `warmup_start_lr` from 0 to `peak_lr`; raises with the name of one."""
    rates = checked_rates(schedule.peak_lr, schedule.min_lr)
    if schedule.warmup_start_lr is not None:
        first, peak = check_number("warmup_start_lr", schedule.warmup_start_lr), rates["peak_lr"]
        if first > peak:
            raise ValueError(f"warmup_start_lr must be a number from 0 to peak_lr={peak!r}, got {first!r}")
        rates["warmup_start_lr"] = first
    return rates
