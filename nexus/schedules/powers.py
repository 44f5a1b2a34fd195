"""Decays by a power: of the time that is left, of the time gone by, and the hyperbolic tangent."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.arguments import LOWEST, check_count, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import NEVER, Curve, Segment, checked_rates, level, segment


@dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
    r"""From the peak to the minimum by a power of the time that is left.

    With :math:`N` the total, in updates, and :math:`n` the power:

    .. math::
        \eta(t) = \eta_{min} + (1 - \min(\frac{t}{N}, 1))^n (\eta_{peak} - \eta_{min})

    Step 0 has the peak, and step N is the first of the minimum.

    Args:
        peak_lr: the rate at step 0, above 0.
        total_steps: N, in updates, at least 1.
        power: n, above 0; 1 is a line.
        min_lr: the rate from `total_steps` on, from 0 to `peak_lr`.

    Source: the "poly" policy of Liu et al. 2015 (ParseNet), arXiv:1506.04579. The same in torch, to 0 alone:
    `PolynomialLR`.

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


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Schedule):
    r"""The peak over the square root of the time gone by.

    With :math:`\tau` the time scale, in updates:

    .. math::
        \eta(t) = \frac{\eta_{peak}}{\sqrt{1 + t / \tau}}

    Step 0 has the peak, step :math:`3 \tau` half of it; there is no last step.

    Args:
        peak_lr: the rate at step 0, above 0.
        timescale: :math:`\tau`, in updates, above 0; need not be an integer.

    Source: Vaswani et al. 2017, arXiv:1706.03762, whose decay, :math:`t^{-1/2}` after W updates of warm-up, has
    :math:`\tau = W`.

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


@dataclass(frozen=True, kw_only=True)
class Tanh(Schedule):
    r"""From the peak to the minimum by a hyperbolic tangent.

    With :math:`N` the total, in updates, and :math:`L, U` the bounds:

    .. math::
        \eta(t) = \begin{cases}
        \eta_{min} + \frac12 (1 - \tanh(L (1 - \frac{t}{N}) + U \frac{t}{N})) (\eta_{peak} - \eta_{min}) & t < N \\
        \eta_{min} & t \ge N
        \end{cases}

    Step 0 is not quite at the peak (with the default bounds, 8e-7 of the height below it), and the last step before N
    not quite at the minimum (2.5e-3 of the height above it): at N the rate jumps down.

    Args:
        peak_lr: the rate that the curve comes from, above 0.
        total_steps: N, in updates, at least 1.
        min_lr: the rate from `total_steps` on, from 0 to `peak_lr`.
        lower: L, less than `upper`.
        upper: U.

    Source: Hsueh et al. 2019, arXiv:1806.01593. The same in timm: `TanhLRScheduler`.

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
