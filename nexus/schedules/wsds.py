"""Warmup-Stable-Decay, simplified: the decay comes again and again."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.arguments import check_choice, check_count
from nexus.schedules.base import Schedule
from nexus.schedules.curves import MAX_SEGMENTS, Layer, Segment, level, segment, start
from nexus.schedules.rises import checked_rising, rise
from nexus.schedules.wsd import WSD_DECAYS, decay_numbers

MAX_CYCLES = (MAX_SEGMENTS - 2) // 2


@dataclass(frozen=True, kw_only=True)
class WSDS(Schedule):
    r"""Warmup-Stable-Decay, simplified: cycles that stay at the peak and decay at their ends.

    With :math:`W` the warm-up, :math:`T` a cycle, :math:`D` the decay at its end, all in updates, :math:`u` the steps
    since the cycle began, :math:`\eta_0` the rate at step 0 of the warm-up, and :math:`f` that of `WSD`:

    .. math::
        \eta(t) = \begin{cases}
        \eta_0 + \frac{t}{W} (\eta_{peak} - \eta_0) & t < W \\
        \eta_{peak} & t \ge W, u < T - D \\
        \eta_{min} + f(\frac{u - T + D}{D}) (\eta_{peak} - \eta_{min}) & t \ge W, u \ge T - D
        \end{cases}

    After a decay the rate is back at the peak at once. Without a warm-up, step 0 has the peak.
    The last step of a linear decay is one part in D short of the minimum; the minimum itself is the rate after the
    last of `cycles`, and stays.

    Args:
        warmup_steps: W, in updates; 0 starts at the peak.
        cycle_length: T, in updates, at least 1.
        decay_steps: D, in updates, from 1 to `cycle_length`.
        peak_lr: the rate of the stable phases, above 0.
        min_lr: the rate that a decay goes to, from 0 to `peak_lr`.
        decay_type: `"linear"`, `"cosine"`, `"sqrt"`, `"exponential"` or `"polynomial"` (of power 2).
        cycles: how many, at most 32,767; None goes on for ever.
        warmup_start_lr: the rate at step 0 of a warm-up, from 0 to `peak_lr`; None is `min_lr`.

    Source: Wen et al. 2024, arXiv:2410.05192.

    >>> WSDS(warmup_steps=2, cycle_length=4, decay_steps=2, peak_lr=1.0).values(0, 10)
    [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5]
    """

    warmup_steps: int
    cycle_length: int
    decay_steps: int
    peak_lr: float
    min_lr: float = 0.0
    decay_type: str = "linear"
    cycles: int | None = None
    warmup_start_lr: float | None = None
    _rates = ("peak_lr", "min_lr", "warmup_start_lr")
    _later = ("warmup_start_lr",)

    def __post_init__(self) -> None:
        self._check_counts(warmup_steps=0, cycle_length=1, decay_steps=1)
        if self.decay_steps > self.cycle_length:
            given = f"cycle_length={self.cycle_length}, got {self.decay_steps}"
            raise ValueError(f"decay_steps must be from 1 to {given}")
        self._set(**checked_rising(self))
        self._set(decay_type=check_choice("decay_type", self.decay_type, WSD_DECAYS))
        if self.cycles is not None:
            checked = check_count("cycles", self.cycles, low=1, high=MAX_CYCLES, also="None (for ever)")
            self._set(cycles=checked)

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"warmup"`, `"stable"`, `"decay"` or `"done"`."""
        step = check_count("step", step)
        if step < self.warmup_steps:
            return "warmup"
        cycle, rest = divmod(step - self.warmup_steps, self.cycle_length)
        if self.cycles is not None and cycle >= self.cycles:
            return "done"
        return "stable" if rest < self.cycle_length - self.decay_steps else "decay"

    def segments(self) -> tuple[Segment, ...]:
        """The rise, two rows for each cycle, the minimum; of endless cycles, `layers` says that they repeat."""
        if self.cycles is None:
            return super().segments()
        return (*self._rows(self.cycles), level(self._begin(self.cycles), self.min_lr))

    def layers(self) -> tuple[Layer, ...]:
        if self.cycles is not None:
            return super().layers()
        return (Layer(self._rows(1), repeat_start=self.warmup_steps, repeat_length=self.cycle_length),)

    def _begin(self, cycle: int) -> int:
        return start(self.warmup_steps + cycle * self.cycle_length)

    def _rows(self, cycles: int) -> tuple[Segment, ...]:
        curve, (k, q) = WSD_DECAYS[self.decay_type], decay_numbers(self.decay_type)
        rows = [rise(self)]
        for cycle in range(cycles):
            decay = start(self.warmup_steps + (cycle + 1) * self.cycle_length - self.decay_steps)
            rows.append(level(self._begin(cycle), self.peak_lr))
            rows.append(segment(curve, decay, self.decay_steps, self.peak_lr, self.min_lr, k=k, q=q))
        return tuple(rows)
