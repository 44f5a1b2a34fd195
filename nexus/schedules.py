r"""Learning-rate schedules as immutable values: the float64 oracle of every evaluator in this package.

Convention, stated here once: `t` is the number of completed updates, from 0, and update `t` uses
`schedule(t)`. That equals the usual loop `optimizer.step(); scheduler.step()` with torch's schedulers.

A schedule says the same thing twice. Calling it is the closed form, written as its paper has it.
`segments()` lowers it to the rows that the evaluators walk. The tests prove the two
equal bit for bit, which is why every value is computed in one order of operations, in float64:
`low + weight * (high - low)`, with `weight` a function of `p = position / length`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from nexus.arguments import MAX_STEP, check_count, check_number, shown
from nexus.cycles import cycle_runs, run_at
from nexus.schedule_base import Schedule
from nexus.segments import NEVER, Curve, Segment

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_STEP",
    "WSD",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Curve",
    "Schedule",
    "Segment",
    "evaluate",
]


def _between(low: float, high: float, weight: float) -> float:
    return low + weight * (high - low)


def _half_cosine(p: float) -> float:
    # (1 + cos(pi p)) / 2 by its half angle: no difference of nearly equal numbers near the end, so that evaluators
    # whose cosines differ in their last bit agree to the last bits of the weight too.
    root = math.cos(0.5 * math.pi * p)
    return root * root


def _checked_rates(peak_lr: object, min_lr: object) -> dict[str, float]:
    peak, low = check_number("peak_lr", peak_lr, positive=True), check_number("min_lr", min_lr)
    if low > peak:
        raise ValueError(f"min_lr must be a number from 0 to peak_lr={peak!r}, got {low!r}")
    return {"peak_lr": peak, "min_lr": low}


def _start(step: int) -> int:
    return step if step <= MAX_STEP else NEVER  # either is exact in a float64 table too


_DECAY_WEIGHTS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "cosine": _half_cosine,
    "sqrt": lambda p: 1.0 - math.sqrt(p),
}
_DECAY_CURVES = {"linear": Curve.LINEAR, "cosine": Curve.COSINE, "sqrt": Curve.SQRT}


@dataclass(frozen=True)
class WSD(Schedule):
    r"""Warmup-Stable-Decay.

    With :math:`W, S, D` the lengths of the phases, :math:`f(p) = 1 - p` (`"linear"`),
    :math:`(1 + \cos \pi p) / 2` (`"cosine"`) or :math:`1 - \sqrt p` (`"sqrt"`):

    .. math::
        \eta(t) = \begin{cases}
        \eta_{min} + \frac{t}{W} (\eta_{peak} - \eta_{min}) & t < W \\
        \eta_{peak} & W \le t < W + S \\
        \eta_{min} + f(\frac{t - W - S}{D}) (\eta_{peak} - \eta_{min}) & W + S \le t < W + S + D \\
        \eta_{min} & \text{after that}
        \end{cases}

    Args:
        warmup_steps: W, in updates; 0 starts at the peak.
        stable_steps: S, in updates; None keeps the peak until `begin_decay`.
        decay_steps: D, in updates, at least 1.
        peak_lr: the rate of the stable phase, above 0.
        min_lr: the rate at step 0 and after the decay, from 0 to `peak_lr`.
        decay_type: `"linear"`, `"cosine"` or `"sqrt"`.

    Raises TypeError or ValueError that names the argument, what was given and what is allowed.
    Sources: Hu et al. 2024 (MiniCPM), arXiv:2404.06395; the square-root decay: Hägele et al. 2024,
    arXiv:2405.18392.

    >>> schedule = WSD(warmup_steps=4, stable_steps=10, decay_steps=8, peak_lr=1.0)
    >>> [schedule(step) for step in (0, 1, 4, 13, 14, 18, 22)]
    [0.0, 0.25, 1.0, 1.0, 1.0, 0.5, 0.0]
    >>> schedule.phase(18)
    'decay'
    """

    warmup_steps: int
    stable_steps: int | None
    decay_steps: int
    peak_lr: float
    min_lr: float = 0.0
    decay_type: str = "linear"
    _rates: ClassVar[tuple[str, ...]] = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        self._set(warmup_steps=check_count("warmup_steps", self.warmup_steps))
        if self.stable_steps is not None:
            self._set(stable_steps=check_count("stable_steps", self.stable_steps, also="None (open-ended)"))
        self._set(decay_steps=check_count("decay_steps", self.decay_steps, low=1))
        self._set(**_checked_rates(self.peak_lr, self.min_lr))
        if not isinstance(self.decay_type, str) or self.decay_type not in _DECAY_CURVES:
            error = ValueError if isinstance(self.decay_type, str) else TypeError
            raise error(f"decay_type must be one of {tuple(_DECAY_CURVES)}, got {shown(self.decay_type)}")
        self._set(decay_type=str(self.decay_type))

    def __call__(self, step: int) -> float:
        """The rate that update `step` uses."""
        step = check_count("step", step)
        if step < self.warmup_steps:
            return _between(self.min_lr, self.peak_lr, step / self.warmup_steps)
        if self.stable_steps is None or step < self.warmup_steps + self.stable_steps:
            return self.peak_lr
        decayed = step - self.warmup_steps - self.stable_steps
        if decayed < self.decay_steps:
            weight = _DECAY_WEIGHTS[self.decay_type](decayed / self.decay_steps)
            return _between(self.min_lr, self.peak_lr, weight)
        return self.min_lr

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"warmup"`, `"stable"`, `"decay"` or `"done"`."""
        step = check_count("step", step)
        if step < self.warmup_steps:
            return "warmup"
        if self.stable_steps is None or step < self.warmup_steps + self.stable_steps:
            return "stable"
        return "decay" if step < self.warmup_steps + self.stable_steps + self.decay_steps else "done"

    def segments(self) -> tuple[Segment, ...]:
        """Four rows: rise, stable, decay, minimum; a phase of no length is a row that is never in force."""
        decay, done = NEVER, NEVER
        if self.stable_steps is not None:
            decay = _start(self.warmup_steps + self.stable_steps)
            done = _start(self.warmup_steps + self.stable_steps + self.decay_steps)
        return (
            Segment(Curve.RISE, 0, max(1, self.warmup_steps), self.peak_lr, self.min_lr),
            Segment(Curve.CONSTANT, self.warmup_steps, 1, self.peak_lr, 0.0),
            Segment(_DECAY_CURVES[self.decay_type], decay, self.decay_steps, self.peak_lr, self.min_lr),
            Segment(Curve.CONSTANT, done, 1, self.min_lr, 0.0),
        )

    def extend_stable(self, n: int) -> WSD:
        """The schedule whose stable phase is `n` updates longer.

        Raises:
            ValueError: the schedule is open-ended (there is nothing to extend), or `n` is negative.
        """
        n = check_count("n", n)
        if self.stable_steps is None:
            raise ValueError("stable_steps is None: an open-ended stable phase has no end to extend")
        return replace(self, stable_steps=self.stable_steps + n)

    def begin_decay(self, step: int) -> WSD:
        """The schedule whose decay begins at `step`, from the rate of that moment.

        In the warm-up that rate becomes the peak; a decay that has begun is left as it is.

        Raises:
            ValueError: the rate at `step` is 0, so there is nothing to decay from.

        >>> WSD(4, None, 8, peak_lr=1.0).begin_decay(10).stable_steps
        6
        """
        step = check_count("step", step)
        phase, rate = self.phase(step), self(step)
        if phase == "stable":
            return replace(self, stable_steps=step - self.warmup_steps)
        if phase != "warmup":
            return self
        if rate == 0.0:
            raise ValueError(f"step={step} has the rate 0: nothing to decay from; begin at a later step")
        return replace(self, warmup_steps=step, stable_steps=0, peak_lr=rate)


@dataclass(frozen=True)
class CosineRestarts(Schedule):
    r"""Cosine annealing with warm restarts (SGDR), after a linear warm-up.

    Cycle :math:`i` has :math:`T_i = \lfloor T_0 m^i \rfloor` updates, in integers, at most 2**62. With
    :math:`u` the steps since the cycle began, in and after the warm-up of :math:`W` updates:

    .. math::
        \eta(t) = \begin{cases}
        \eta_{min} + \frac{t}{W} (\eta_{peak} - \eta_{min}) & t < W \\
        \eta_{min} + \frac12 (1 + \cos \frac{\pi u}{T_i}) (\eta_{peak} - \eta_{min}) & t \ge W
        \end{cases}

    Args:
        peak_lr: the rate that each cycle starts from, above 0.
        min_lr: the rate at step 0 of a warm-up and towards the end of a cycle, from 0 to `peak_lr`.
        cycle_length: T_0, in updates, at least 1.
        cycle_mult: m, at least 1; 1 or from about 1.0004 on.
        warmup_steps: W, in updates.

    Raises TypeError or ValueError that names the argument, what was given and what is allowed.
    Source: Loshchilov & Hutter 2017, arXiv:1608.03983.

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
    _rates: ClassVar[tuple[str, ...]] = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        self._set(**_checked_rates(self.peak_lr, self.min_lr))
        self._set(cycle_length=check_count("cycle_length", self.cycle_length, low=1))
        self._set(cycle_mult=check_number("cycle_mult", self.cycle_mult, low=1.0))
        self._set(warmup_steps=check_count("warmup_steps", self.warmup_steps))
        cycle_runs(self.cycle_length, self.cycle_mult)  # raises where there would be too many

    def __call__(self, step: int) -> float:
        """The rate that update `step` uses."""
        step = check_count("step", step)
        if step < self.warmup_steps:
            return _between(self.min_lr, self.peak_lr, step / self.warmup_steps)
        _, step_in_cycle, cycle_length = self.cycle(step)
        return _between(self.min_lr, self.peak_lr, _half_cosine(step_in_cycle / cycle_length))

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
        """The warm-up, then a row for each run of cycles of equal length."""
        warmup = Segment(Curve.RISE, 0, max(1, self.warmup_steps), self.peak_lr, self.min_lr)
        cycles = (
            Segment(Curve.COSINE, _start(self.warmup_steps + run.start), run.length, self.peak_lr, self.min_lr)
            for run in cycle_runs(self.cycle_length, self.cycle_mult)
        )
        return (warmup, *cycles)


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""One half-cosine from the peak to the minimum, after a linear warm-up.

    With :math:`W` the warm-up and :math:`N` the total, both in updates:

    .. math::
        \eta(t) = \begin{cases}
        \eta_{min} + \frac{t}{W} (\eta_{peak} - \eta_{min}) & t < W \\
        \eta_{min} + \frac12 (1 + \cos \pi \frac{t - W}{N - W}) (\eta_{peak} - \eta_{min}) & W \le t < N \\
        \eta_{min} & t \ge N
        \end{cases}

    Args:
        peak_lr: the rate at the end of the warm-up, above 0.
        total_steps: N, in updates, the warm-up included; more than `warmup_steps`.
        min_lr: the rate at step 0 of a warm-up and from `total_steps` on, from 0 to `peak_lr`.
        warmup_steps: W, in updates.

    Raises TypeError or ValueError that names the argument, what was given and what is allowed.
    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, with one cycle.

    >>> schedule = Cosine(peak_lr=1.0, total_steps=10, warmup_steps=2)
    >>> [round(schedule(step), 3) for step in (0, 1, 2, 6, 10, 11)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    peak_lr: float
    total_steps: int
    min_lr: float = 0.0
    warmup_steps: int = 0
    _rates: ClassVar[tuple[str, ...]] = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        self._set(**_checked_rates(self.peak_lr, self.min_lr))
        self._set(total_steps=check_count("total_steps", self.total_steps, low=1))
        warmup = check_count("warmup_steps", self.warmup_steps)
        if warmup >= self.total_steps:
            raise ValueError(f"warmup_steps must be less than total_steps={self.total_steps}, got {warmup}")
        self._set(warmup_steps=warmup)

    def __call__(self, step: int) -> float:
        """The rate that update `step` uses."""
        step = check_count("step", step)
        if step < self.warmup_steps:
            return _between(self.min_lr, self.peak_lr, step / self.warmup_steps)
        if step < self.total_steps:
            p = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
            return _between(self.min_lr, self.peak_lr, _half_cosine(p))
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
            Segment(Curve.RISE, 0, max(1, self.warmup_steps), self.peak_lr, self.min_lr),
            Segment(Curve.COSINE, self.warmup_steps, length, self.peak_lr, self.min_lr),
            Segment(Curve.CONSTANT, self.total_steps, 1, self.min_lr, 0.0),
        )


@dataclass(frozen=True)
class Constant(Schedule):
    r"""The same rate at every step: :math:`\eta(t) = \eta`.

    Args:
        lr: the rate, 0 or above.

    Raises TypeError or ValueError that names the argument, what was given and what is allowed.

    >>> 2 * Constant(lr=0.5)
    Constant(lr=1.0)
    """

    lr: float
    _rates: ClassVar[tuple[str, ...]] = ("lr",)

    def __post_init__(self) -> None:
        self._set(lr=check_number("lr", self.lr))

    def __call__(self, step: int) -> float:
        """The rate that update `step` uses."""
        check_count("step", step)
        return self.lr

    def phase(self, step: int) -> str:
        """Always `"constant"`."""
        check_count("step", step)
        return "constant"

    def segments(self) -> tuple[Segment, ...]:
        """One row."""
        return (Segment(Curve.CONSTANT, 0, 1, self.lr, 0.0),)


def evaluate(
    schedule: Schedule,
    steps: torch.Tensor,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The rates at any steps, by the very evaluator that the optimizer's kernels use.

    Args:
        schedule: any `Schedule`.
        steps: int64 tensor of any shape: numbers of completed updates, from 0 to 2**53.
        device: where to evaluate; that of `steps` by default.
        backend: a backend's name, or `"auto"` for the one that the optimizer would choose there.

    Returns:
        float64 tensor of the shape of `steps`.

    Raises:
        TypeError, ValueError: `steps` of another dtype or out of range, or an unknown backend.
    """
    from nexus.schedule_table import evaluate as run  # imports torch, which the oracle does not need

    return run(schedule, steps, device, backend)
