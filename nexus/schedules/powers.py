"""Decays by a power: of the time that is left, of the time gone by, and the hyperbolic tangent."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.arguments import LOWEST, check_count, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import NEVER, Curve, Segment, checked_rates, level, segment


@dataclass(frozen=True)
class Polynomial(Schedule):
    r"""From the peak to the minimum by a power of what is left.

    >>> Polynomial(peak_lr=1.0, total_steps=4, power=2.0).values(0, 6)
    [1.0, 0.5625, 0.25, 0.0625, 0.0, 0.0]
    """

    peak_lr: float
    total_steps: int
    power: float = 1.0
    min_lr: float = 0.0
    _rates = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        self._set(**checked_rates(self.peak_lr, self.min_lr))
        self._check_counts(total_steps=1)
        self._set(power=check_number("power", self.power, positive=True))

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"polynomial"` or `"done"`."""
        return "polynomial" if check_count("step", step) < self.total_steps else "done"

    def segments(self) -> tuple[Segment, ...]:
        """Two rows: the decay, the minimum."""
        return (
            segment(Curve.POWER, 0, self.total_steps, self.peak_lr, self.min_lr, q=self.power),
            level(self.total_steps, self.min_lr),
        )


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    r"""The peak over the square root of the time gone by.

    >>> InverseSqrt(peak_lr=1.0, timescale=3)(9)
    0.5
    """

    peak_lr: float
    timescale: float
    _rates = ("peak_lr",)

    def __post_init__(self) -> None:
        self._set(peak_lr=check_number("peak_lr", self.peak_lr, positive=True))
        self._set(timescale=check_number("timescale", self.timescale, positive=True))

    def phase(self, step: int) -> str:
        """`"inverse"`, whatever the step."""
        check_count("step", step)
        return "inverse"

    def segments(self) -> tuple[Segment, ...]:
        """One row."""
        return (segment(Curve.INVERSE, 0, NEVER, self.peak_lr, span=self.timescale, q=0.5),)


@dataclass(frozen=True)
class Tanh(Schedule):
    r"""From the peak to the minimum by a hyperbolic tangent.

    >>> schedule = Tanh(peak_lr=1.0, total_steps=10)
    >>> [round(schedule(step), 3) for step in (0, 5, 7, 9, 10)]
    [1.0, 0.982, 0.5, 0.018, 0.0]
    """

    peak_lr: float
    total_steps: int
    min_lr: float = 0.0
    lower: float = -7.0
    upper: float = 3.0
    _rates = ("peak_lr", "min_lr")

    def __post_init__(self) -> None:
        self._set(**checked_rates(self.peak_lr, self.min_lr))
        self._check_counts(total_steps=1)
        self._set(**{name: check_number(name, getattr(self, name), low=LOWEST) for name in ("lower", "upper")})
        if self.lower >= self.upper:
            raise ValueError(f"lower must be less than upper={self.upper!r}, got {self.lower!r}")

    def phase(self, step: int) -> str:
        """The phase of update `step`: `"tanh"` or `"done"`."""
        return "tanh" if check_count("step", step) < self.total_steps else "done"

    def segments(self) -> tuple[Segment, ...]:
        """Two rows: the decay, the minimum."""
        return (
            segment(Curve.TANH, 0, self.total_steps, self.peak_lr, self.min_lr, k=self.lower, q=self.upper),
            level(self.total_steps, self.min_lr),
        )
