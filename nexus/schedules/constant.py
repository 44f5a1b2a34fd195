"""A rate that stays."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.arguments import check_count, check_number
from nexus.schedules.base import Schedule
from nexus.schedules.curves import Segment, level


@dataclass(frozen=True)
class Constant(Schedule):
    r"""The same rate at every step: :math:`\eta(t) = \eta`.

    Args:
        lr: the rate, 0 or above.

    >>> 2 * Constant(lr=0.5)
    Constant(lr=1.0)
    """

    lr: float
    _rates = ("lr",)

    def __post_init__(self) -> None:
        self._set(lr=check_number("lr", self.lr))

    def __call__(self, step: int) -> float:
        check_count("step", step)
        return self.lr

    def phase(self, step: int) -> str:
        check_count("step", step)
        return "constant"

    def segments(self) -> tuple[Segment, ...]:
        return (level(0, self.lr),)
