"""One curve by itself: what joins are made of where no other schedule has exactly the same rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from nexus.arguments import LOWEST, MAX_STEP, check_choice, check_count, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import NEVER, Curve, Segment, level, segment

CURVES = {curve.name.lower(): curve for curve in Curve if curve not in (Curve.CONSTANT, Curve.SAMPLED)}

ENDING = ("linear", "rise", "sqrt", "power")
"""Those that have no numbers, or no rates, past p = 1."""
RULES: tuple[tuple[tuple[str, ...], Callable[[Arc], bool], str], ...] = (
    (ENDING, lambda arc: arc.shift >= 0.0, "shift must be 0 or above"),
    (("inverse",), lambda arc: arc.shift > -arc.span, "shift must be above -span"),
    (("log",), lambda arc: arc.shift > 0.0, "shift must be above 0"),
    (("power", "cosine"), lambda arc: arc.k > 0.0 and arc.q > 0.0, "k and q must be above 0"),
    (("exponential",), lambda arc: arc.k != 1.0, "k must not be 1 (0 is q**p)"),
    (("exponential", "staircase"), lambda arc: arc.q > 0.0, "q must be above 0"),
)


@dataclass(frozen=True)
class Arc(Schedule):
    r"""One curve, from any place of it on.

    With :math:`w` the weight of the curve (see `nexus.schedules.Curve`), at the place :math:`p = (t + shift) / span`:

    .. math::
        \eta(t) = \eta_{low} + w(p) (\eta_{high} - \eta_{low})

    The half-cosine goes on as a wave: :math:`w(p) = (1 + \cos \pi p) / 2` falls until p = 1, rises until p = 2, and
    falls again. Lines, roots and powers stay where they are at p = 1. The others have no end.

    Args:
        curve: `"cosine"`, `"linear"`, `"rise"`, `"sqrt"`, `"power"`, `"exponential"`, `"staircase"`, `"inverse"`,
            `"log"` or `"tanh"`.
        high: the rate where the weight is 1, 0 or above; it may be less than `low`.
        low: the rate where the weight is 0, 0 or above.
        span: the updates from p = 0 to p = 1, above 0.
        shift: the updates that have gone by at step 0.
        k, q: the curve's numbers.

    >>> [round(rate, 3) for rate in Arc("cosine", high=1.0, low=0.0, span=2.0).values(0, 6)]
    [1.0, 0.5, 0.0, 0.5, 1.0, 0.5]
    """

    curve: str
    _: KW_ONLY
    high: float
    low: float
    span: float
    shift: float = 0.0
    k: float = 1.0
    q: float = 1.0
    _rates = ("high", "low")

    def __post_init__(self) -> None:
        self._set(curve=check_choice("curve", self.curve, CURVES))
        self._set(high=check_number("high", self.high), low=check_number("low", self.low))
        self._set(span=check_number("span", self.span, positive=True))
        self._set(**{name: check_number(name, getattr(self, name), low=LOWEST) for name in ("shift", "k", "q")})
        for curves, is_right, rule in RULES:
            if self.curve in curves and not is_right(self):
                raise ValueError(f"{rule} where curve is {self.curve!r}, got {self!r}")

    def phase(self, step: int) -> str:
        """The curve's name."""
        check_count("step", step)
        return self.curve

    def segments(self) -> tuple[Segment, ...]:
        """One row, a wave's with a period of two spans if these are whole."""
        period = NEVER
        if self.curve == "cosine" and self.k == 1.0 and float(2.0 * self.span).is_integer():
            period = int(min(2.0 * self.span, float(NEVER)))
        numbers = {"offset": self.shift, "span": self.span, "k": self.k, "q": self.q}
        row = segment(CURVES[self.curve], 0, period, self.high, self.low, **numbers)
        end = math.ceil(self.span - self.shift)
        if self.curve not in ENDING or end > MAX_STEP:
            return (row,)
        last = level(max(0, end), self.high if self.curve == "rise" else self.low)
        return (row, last) if end > 0 else (last,)
