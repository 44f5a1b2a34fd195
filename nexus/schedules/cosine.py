"""Half-cosines: one, or many with warm restarts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from nexus.arguments import check_count, check_fraction, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import (
    MAX_SEGMENTS,
    NEVER,
    Curve,
    Layer,
    Op,
    Segment,
    between,
    level,
    segment,
    start,
)
from nexus.schedules.cycles import cycle_runs, run_at
from nexus.schedules.rises import checked_rising, first_rate, rise, rising_rate


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    r"""Cosine annealing with warm restarts (SGDR), after a linear warm-up.

    Cycle :math:`i` has :math:`T_i = \lfloor T_0 m^i \rfloor` updates, in integers, at most 2**62. With
    :math:`u` the steps since the cycle began, and :math:`\eta_0` the rate at step 0 of the warm-up, in and after the
    warm-up of :math:`W` updates:

    .. math::
        \eta(t) = \begin{cases}
        \eta_0 + \frac{t}{W} (\eta_{peak} - \eta_0) & t < W \\
        \eta_{min} + \frac12 (1 + \cos \frac{\pi u}{T_i}) (\eta_{peak} - \eta_{min}) & t \ge W
        \end{cases}

    Args:
        peak_lr: the rate that each cycle starts from, above 0.
        min_lr: the rate towards the end of a cycle, from 0 to `peak_lr`.
        cycle_length: T_0, in updates, at least 1.
        cycle_mult: m, at least 1; 1 or from about 1.0004 on.
        warmup_steps: W, in updates.
        cycle_decay: d, above 0 and at most 1: cycle :math:`i` starts from :math:`\eta_{peak} d^i`, in place of
            :math:`\eta_{peak}`, and rises to the minimum where that is the higher one.
        warmup_start_lr: the rate at step 0 of a warm-up, from 0 to `peak_lr`; None is `min_lr`.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983; `cycle_decay` is timm's.

    >>> schedule = CosineRestarts(peak_lr=1.0, cycle_length=4, cycle_mult=2.0)
    >>> [round(schedule(step), 3) for step in (0, 2, 4, 8, 12)]
    [1.0, 0.5, 1.0, 0.5, 1.0]
    >>> schedule.cycle(8)
    (1, 4, 8)
    """

    peak_lr: float
    min_lr: float = 0.0
    cycle_length: int = 10_000
    cycle_mult: float = 1.0
    warmup_steps: int = 0
    cycle_decay: float = 1.0
    warmup_start_lr: float | None = None
    _rates = ("peak_lr", "min_lr", "warmup_start_lr")
    _later = ("cycle_decay", "warmup_start_lr")

    def __post_init__(self) -> None:
        self._set(**checked_rising(self))
        self._check_counts(cycle_length=1, warmup_steps=0)
        self._set(cycle_mult=check_number("cycle_mult", self.cycle_mult, low=1.0))
        runs = cycle_runs(self.cycle_length, self.cycle_mult)  # raises where there would be too many
        self._set(cycle_decay=check_fraction("cycle_decay", self.cycle_decay, positive=True))
        if self.cycle_decay != 1.0 and self.cycle_mult != 1.0 and runs[-1].first + 2 > MAX_SEGMENTS:
            raise ValueError(
                f"cycle_decay={self.cycle_decay!r} needs a row for each cycle of cycle_length={self.cycle_length}, "
                f"cycle_mult={self.cycle_mult!r}, and these are more than {MAX_SEGMENTS:,}; cycle_mult must be 1.0 "
                "(equal cycles) or at least 1.0004"
            )

    def __call__(self, step: int) -> float:
        step = check_count("step", step)
        if self.cycle_decay != 1.0:
            return super().__call__(step)
        if step < self.warmup_steps:
            return rising_rate(self, step)
        _, step_in_cycle, cycle_length = self.cycle(step)
        return between(self.min_lr, self.peak_lr, Curve.COSINE, step_in_cycle / cycle_length)

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"warmup"` or `"cosine"`."""
        return "warmup" if check_count("step", step) < self.warmup_steps else "cosine"

    def cycle(self, step: int) -> tuple[int, int, int]:
        """Index of the cycle that update `step` is in, the step in that cycle, and the cycle's length.

        In the warm-up that is `(-1, step, warmup_steps)`.
        """
        step = check_count("step", step)
        if step < self.warmup_steps:
            return -1, step, self.warmup_steps
        step_of_cycles = step - self.warmup_steps
        run = run_at(cycle_runs(self.cycle_length, self.cycle_mult), step_of_cycles)
        repeat, step_in_cycle = divmod(step_of_cycles - run.start, run.length)
        return run.first + repeat, step_in_cycle, run.length

    def segments(self) -> tuple[Segment, ...]:
        """The warm-up, then a row for each run of cycles of equal length, or for each cycle if peaks fall."""
        if self.cycle_decay != 1.0:
            return self._falling_rows()
        cycles = (
            segment(Curve.COSINE, start(self.warmup_steps + run.start), run.length, self.peak_lr, self.min_lr)
            for run in cycle_runs(self.cycle_length, self.cycle_mult)
        )
        return (rise(self), *cycles)

    def layers(self) -> tuple[Layer, ...]:
        """One layer; three where the peaks of equal cycles fall: weight x peak + (1 - weight) x minimum."""
        if self.cycle_decay == 1.0 or self.cycle_mult != 1.0:
            return super().layers()
        warmup, length = self.warmup_steps, self.cycle_length
        rising = max(1, warmup)
        peaks = segment(Curve.STAIRCASE, warmup, NEVER, self.peak_lr, span=float(length), q=self.cycle_decay)
        return (
            Layer((segment(Curve.RISE, 0, rising, 1.0), segment(Curve.COSINE, warmup, length, 1.0))),
            Layer((level(0, self.peak_lr), peaks), Op.TIMES),
            Layer(
                (
                    segment(Curve.LINEAR, 0, rising, first_rate(self)),
                    segment(Curve.COSINE, warmup, length, 0.0, self.min_lr),
                ),
                Op.PLUS,
            ),
        )

    def _falling_rows(self) -> tuple[Segment, ...]:
        if self.cycle_mult == 1.0:
            return super().segments()  # raises: there are three layers
        rows = [rise(self)]
        runs = cycle_runs(self.cycle_length, self.cycle_mult)
        for run, following in itertools.zip_longest(runs, runs[1:]):
            for index in range(run.first, following.first if following else run.first + 1):
                first = start(self.warmup_steps + run.start + (index - run.first) * run.length)
                peak = self.peak_lr * self.cycle_decay**index
                rows.append(segment(Curve.COSINE, first, run.length, peak, self.min_lr))
        return tuple(rows)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    r"""One half-cosine from the peak to the minimum, after a linear warm-up.

    With :math:`W` the warm-up and :math:`N` the total, both in updates, and :math:`\eta_0` the rate at step 0 of the
    warm-up:

    .. math::
        \eta(t) = \begin{cases}
        \eta_0 + \frac{t}{W} (\eta_{peak} - \eta_0) & t < W \\
        \eta_{min} + \frac12 (1 + \cos \pi \frac{t - W}{N - W}) (\eta_{peak} - \eta_{min}) & W \le t < N \\
        \eta_{min} & t \ge N
        \end{cases}

    Args:
        peak_lr: the rate at the end of the warm-up, above 0.
        total_steps: N, in updates, the warm-up included; more than `warmup_steps`.
        min_lr: the rate from `total_steps` on, from 0 to `peak_lr`.
        warmup_steps: W, in updates.
        warmup_start_lr: the rate at step 0 of a warm-up, from 0 to `peak_lr`; None is `min_lr`.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, with one cycle.

    >>> schedule = Cosine(peak_lr=1.0, total_steps=10, warmup_steps=2)
    >>> [round(schedule(step), 3) for step in (0, 1, 2, 6, 10, 11)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    peak_lr: float
    total_steps: int
    min_lr: float = 0.0
    warmup_steps: int = 0
    warmup_start_lr: float | None = None
    _rates = ("peak_lr", "min_lr", "warmup_start_lr")
    _later = ("warmup_start_lr",)

    def __post_init__(self) -> None:
        self._set(**checked_rising(self))
        self._check_counts(total_steps=1, warmup_steps=0)
        if self.warmup_steps >= self.total_steps:
            given = f"total_steps={self.total_steps}, got {self.warmup_steps}"
            raise ValueError(f"warmup_steps must be less than {given}")

    def __call__(self, step: int) -> float:
        step = check_count("step", step)
        if step < self.warmup_steps:
            return rising_rate(self, step)
        if step < self.total_steps:
            p = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            return between(self.min_lr, self.peak_lr, Curve.COSINE, p)
        return self.min_lr

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"warmup"`, `"cosine"` or `"done"`."""
        step = check_count("step", step)
        if step < self.warmup_steps:
            return "warmup"
        return "cosine" if step < self.total_steps else "done"

    def segments(self) -> tuple[Segment, ...]:
        """Three rows: rise, half-cosine, minimum."""
        length = self.total_steps - self.warmup_steps
        return (
            rise(self),
            segment(Curve.COSINE, self.warmup_steps, length, self.peak_lr, self.min_lr),
            level(self.total_steps, self.min_lr),
        )
