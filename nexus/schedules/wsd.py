"""Warmup-Stable-Decay."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nexus.arguments import check_choice, check_count, check_fraction, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import DECAYS, NEVER, Curve, Segment, between, level, segment, start
from nexus.schedules.rises import checked_rising, rise, rising_rate

WSD_DECAYS = DECAYS | {"exponential": Curve.EXPONENTIAL, "polynomial": Curve.POWER}
"""The curves of a decay from the peak, by the names that `decay_type` takes."""


def decay_numbers(decay_type: str, decay_power: float = 2.0) -> tuple[float, float]:
    """The numbers k and q of the curve of a decay."""
    if decay_type == "exponential":
        return 0.5, 0.5  # 2 * 0.5**p - 1
    return (1.0, decay_power) if decay_type == "polynomial" else (1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    r"""Warmup-Stable-Decay.

    With :math:`W, S, D` the lengths of the phases, :math:`\eta_0` the rate at step 0 of the warm-up, and
    :math:`f(p) = 1 - p` (`"linear"`), :math:`(1 + \cos \pi p) / 2` (`"cosine"`), :math:`1 - \sqrt p` (`"sqrt"`),
    :math:`2 \cdot 2^{-p} - 1` (`"exponential"`) or :math:`(1 - p)^n` (`"polynomial"`):

    .. math::
        \eta(t) = \begin{cases}
        \eta_0 + \frac{t}{W} (\eta_{peak} - \eta_0) & t < W \\
        \eta_{peak} & W \le t < W + S \\
        \eta_{min} + f(\frac{t - W - S}{D}) (\eta_{peak} - \eta_{min}) & W + S \le t < W + S + D \\
        \eta_{min} & \text{after that}
        \end{cases}

    Args:
        warmup_steps: W, in updates; 0 starts at the peak.
        stable_steps: S, in updates; None keeps the peak until `begin_decay`.
        decay_steps: D, in updates, at least 1.
        peak_lr: the rate of the stable phase, above 0.
        min_lr: the rate after the decay, from 0 to `peak_lr`.
        decay_type: `"linear"`, `"cosine"`, `"sqrt"`, `"exponential"` or `"polynomial"`.
        decay_power: n, above 0; of a `"polynomial"` decay alone.
        warmup_start_lr: the rate at step 0 of a warm-up, from 0 to `peak_lr`; None is `min_lr`.

    Sources: Hu et al. 2024 (MiniCPM), arXiv:2404.06395; the square-root decay: Hägele et al. 2024,
    arXiv:2405.18392; the exponential one: Megatron-LM's `--lr-wsd-decay-style`.

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
    decay_power: float = 2.0
    warmup_start_lr: float | None = None
    _rates = ("peak_lr", "min_lr", "warmup_start_lr")
    _later = ("decay_power", "warmup_start_lr")
    _ratios = ", or write WSD.from_fractions(total_steps, warmup=..., decay=..., peak_lr=...)"

    def __post_init__(self) -> None:
        self._check_counts(warmup_steps=0, decay_steps=1)
        if self.stable_steps is not None:
            self._set(
                stable_steps=check_count(
                    "stable_steps", self.stable_steps, also="None (open-ended)", ratios=self._ratios
                )
            )
        self._set(**checked_rising(self))
        self._set(decay_type=check_choice("decay_type", self.decay_type, WSD_DECAYS))
        self._set(decay_power=check_number("decay_power", self.decay_power, positive=True))

    def __call__(self, step: int) -> float:
        step = check_count("step", step)
        if step < self.warmup_steps:
            return rising_rate(self, step)
        if self.stable_steps is None or step < self.warmup_steps + self.stable_steps:
            return self.peak_lr
        decayed = step - self.warmup_steps - self.stable_steps
        if decayed < self.decay_steps:
            k, q = decay_numbers(self.decay_type, self.decay_power)
            return between(self.min_lr, self.peak_lr, WSD_DECAYS[self.decay_type], decayed / self.decay_steps, k, q)
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
            decay = start(self.warmup_steps + self.stable_steps)
            done = start(self.warmup_steps + self.stable_steps + self.decay_steps)
        curve, (k, q) = WSD_DECAYS[self.decay_type], decay_numbers(self.decay_type, self.decay_power)
        return (
            rise(self),
            level(self.warmup_steps, self.peak_lr),
            segment(curve, decay, self.decay_steps, self.peak_lr, self.min_lr, k=k, q=q),
            level(done, self.min_lr),
        )

    @classmethod
    def from_fractions(
        cls,
        total_steps: int,
        *,
        warmup: float,
        decay: float,
        peak_lr: float,
        min_lr: float = 0.0,
        decay_type: str = "linear",
        decay_power: float = 2.0,
        warmup_start_lr: float | None = None,
    ) -> WSD:
        """The schedule whose phases are shares of a run; what the warm-up and the decay leave is the stable phase.

        Args:
            total_steps: updates in all, at least 1.
            warmup: the share of the warm-up, from 0 to 1, rounded to whole updates.
            decay: the share of the decay, which has one update at least; with `warmup` 1 at most.
            peak_lr: as of the schedule, and so are those that follow.
            min_lr: the rate after the decay.
            decay_type: the curve of the decay.
            decay_power: of a polynomial decay.
            warmup_start_lr: the rate at step 0 of the warm-up.

        Raises:
            TypeError, ValueError: naming the argument, what was given and what is allowed.

        >>> WSD.from_fractions(1000, warmup=0.1, decay=0.2, peak_lr=1.0).stable_steps
        700
        """
        total_steps = check_count("total_steps", total_steps, low=1)
        warmup, decay = check_fraction("warmup", warmup), check_fraction("decay", decay)
        if warmup + decay > 1.0:
            raise ValueError(f"warmup and decay must be 1 in all at most, got {warmup!r} and {decay!r}")
        decay_steps = max(1, round(decay * total_steps))
        warmup_steps = min(round(warmup * total_steps), total_steps - decay_steps)
        stable_steps = total_steps - warmup_steps - decay_steps
        return cls(
            warmup_steps=warmup_steps,
            stable_steps=stable_steps,
            decay_steps=decay_steps,
            peak_lr=peak_lr,
            min_lr=min_lr,
            decay_type=decay_type,
            decay_power=decay_power,
            warmup_start_lr=warmup_start_lr,
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

        In the warm-up that rate becomes the peak, or `min_lr` where that is higher; a decay that has begun is left as
        it is.

        Raises:
            ValueError: the peak would be 0, so there is nothing to decay from.

        >>> WSD(warmup_steps=4, stable_steps=None, decay_steps=8, peak_lr=1.0).begin_decay(10).stable_steps
        6
        """
        step = check_count("step", step)
        phase, rate = self.phase(step), max(self(step), self.min_lr)
        if phase == "stable":
            return replace(self, stable_steps=step - self.warmup_steps)
        if phase != "warmup":
            return self
        if rate == 0.0:
            raise ValueError(f"step={step} has the rate 0: nothing to decay from; begin at a later step")
        return replace(self, warmup_steps=step, stable_steps=0, peak_lr=rate)
