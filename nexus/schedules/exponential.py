"""Decays by a factor: at every step, in stairs, at milestones."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from nexus.arguments import check_count, check_number, shown
from nexus.schedules.base import Schedule
from nexus.schedules.curves import MAX_SEGMENTS, NEVER, Curve, Segment, checked_rates, level, segment


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    r"""A factor for every so many updates, evenly spread over them.

    With :math:`E` the updates of a factor :math:`\gamma`:

    .. math::
        \eta(t) = \eta_{min} + \gamma^{t / E} (\eta_{peak} - \eta_{min})

    Step 0 has the peak; there is no last step.

    Args:
        peak_lr: the rate at step 0, above 0.
        gamma: :math:`\gamma`, above 0; above 1 the rate rises, at most to the largest float.
        every: E, in updates, at least 1.
        min_lr: what the rate comes near to, from 0 to `peak_lr`.

    The same in torch, with `every=1` and no minimum: `ExponentialLR`; in optax: `exponential_decay`.

    >>> Exponential(peak_lr=1.0, gamma=0.25, every=2).values(0, 5)
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """

    peak_lr: float
    gamma: float
    every: int = 1
    min_lr: float = 0.0
    _rates = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        _check_decay(self)

    def phase(self, step: int) -> str:
        """`"exponential"`, whatever the step."""
        check_count("step", step)
        return "exponential"

    def segments(self) -> tuple[Segment, ...]:
        """One row."""
        return (_decay(Curve.EXPONENTIAL, self),)


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    r"""A factor at the end of every so many updates.

    With :math:`E` the updates of a stair and :math:`\gamma` the factor:

    .. math::
        \eta(t) = \eta_{min} + \gamma^{\lfloor t / E \rfloor} (\eta_{peak} - \eta_{min})

    Steps 0 to E - 1 have the peak, and step E is the first of the next stair; there is no last step.

    Args:
        peak_lr: the rate of the first stair, above 0.
        gamma: :math:`\gamma`, above 0; above 1 the rate rises, at most to the largest float.
        every: E, in updates, at least 1.
        min_lr: what the rate comes near to, from 0 to `peak_lr`.

    The same in torch, with no minimum: `StepLR`; in optax: `exponential_decay` with `staircase=True`.

    >>> StepDecay(peak_lr=1.0, gamma=0.5, every=2).values(0, 5)
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    peak_lr: float
    gamma: float
    every: int
    min_lr: float = 0.0
    _rates = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        _check_decay(self)

    def phase(self, step: int) -> str:
        """`"stairs"`, whatever the step."""
        check_count("step", step)
        return "stairs"

    def segments(self) -> tuple[Segment, ...]:
        """One row."""
        return (_decay(Curve.STAIRCASE, self),)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    r"""A factor at each milestone.

    With the milestones :math:`m_i` and the factor :math:`\gamma`:

    .. math::
        \eta(t) = \gamma^{\#\{i : m_i \le t\}} \eta_{peak}

    A milestone is the first step of its stage; the last stage stays.

    Args:
        peak_lr: the rate before all milestones, above 0.
        milestones: steps in ascending order, fewer than 65,536; a step that is there twice counts twice.
        gamma: :math:`\gamma`, 0 or above.

    The same in torch: `MultiStepLR`.

    >>> MultiStep(peak_lr=1.0, milestones=[2, 4], gamma=0.5).values(0, 6)
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    peak_lr: float
    milestones: tuple[int, ...]
    gamma: float
    _rates = ("peak_lr",)

    def __post_init__(self) -> None:
        self._set(peak_lr=check_number("peak_lr", self.peak_lr, positive=True))
        self._set(milestones=_checked_milestones(self.milestones), gamma=check_number("gamma", self.gamma))
        for row in self.segments():
            check_number(f"peak_lr * gamma**{bisect_right(self.milestones, row.start)}", row.high)

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"stage i"`, after i milestones."""
        return f"stage {bisect_right(self.milestones, check_count('step', step))}"

    def segments(self) -> tuple[Segment, ...]:
        """A row for each stage."""
        starts = sorted({0, *self.milestones})
        return tuple(level(start, self._rate(bisect_right(self.milestones, start))) for start in starts)

    def _rate(self, passed: int) -> float:
        try:
            return self.peak_lr * self.gamma**passed
        except OverflowError:
            return float("inf")


def _check_decay(schedule: Exponential | StepDecay) -> None:
    schedule._set(**checked_rates(schedule.peak_lr, schedule.min_lr))
    schedule._set(gamma=check_number("gamma", schedule.gamma, positive=True))
    schedule._check_counts(every=1)


def _decay(curve: Curve, schedule: Exponential | StepDecay) -> Segment:
    peak, low, span = schedule.peak_lr, schedule.min_lr, float(schedule.every)
    gamma = schedule.gamma if low < peak else 1.0  # infinity times no height would be NaN
    return segment(curve, 0, NEVER, peak, low, span=span, k=0.0, q=gamma)


def _checked_milestones(milestones: object) -> tuple[int, ...]:
    allowed = "milestones must be steps in ascending order"
    if not isinstance(milestones, Sequence) or isinstance(milestones, str):
        raise TypeError(f"{allowed}, got {shown(milestones)}")
    if len(milestones) >= MAX_SEGMENTS:
        raise ValueError(f"{allowed}, fewer than {MAX_SEGMENTS:,}, got {len(milestones):,}")
    checked = tuple(check_count(f"milestones[{i}]", step) for i, step in enumerate(milestones))
    if list(checked) != sorted(checked):
        raise ValueError(f"{allowed}, got {shown(milestones)}")
    return checked
