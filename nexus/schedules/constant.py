"""A rate that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from nexus.arguments import check_count, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import Curve, Segment


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
    _name: ClassVar[str] = "constant"
    _plotted: ClassVar[dict[str, float]] = {"lr": 1e-3}
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
