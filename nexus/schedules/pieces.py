"""Pieces of schedules that begin at whatever rate there is: what an edit in a live run puts in force."""

from __future__ import annotations

from typing import NamedTuple

from nexus.arguments import MAX_STEP, shown
from nexus.schedules.arc import ENDING, Arc
from nexus.schedules.base import Schedule, layers_of
from nexus.schedules.bounds import bounds_of
from nexus.schedules.compose import join
from nexus.schedules.constant import Constant
from nexus.schedules.wsd import WSD, WSD_DECAYS, decay_numbers


class FromRate(NamedTuple):
    """From the rate of the moment at which it begins, on a curve to another rate; without a curve, it stays.

    The rate is the `high` of the first row of the first layer, where a table has it filled in on the device.
    """

    curve: str = ""
    to: float = 0.0
    steps: int = 1
    k: float = 1.0
    q: float = 1.0

    def schedule(self, rate: float) -> Schedule:
        """The piece, once the rate is known."""
        if not self.curve:
            return Constant(rate)
        arc = Arc(self.curve, high=rate, low=self.to, span=float(self.steps), k=self.k, q=self.q)
        return arc if self.curve in ENDING else join([arc, Constant(self.to)], [self.steps])

    def has_made(self, piece: Schedule) -> bool:
        """Whether a schedule is this piece, from some rate."""
        return piece == self.schedule(layers_of(piece)[0].segments[0].high)


def decay_of(schedule: WSD) -> FromRate:
    """The decay of a WSD, from any rate."""
    k, q = decay_numbers(schedule.decay_type, schedule.decay_power)
    curve = WSD_DECAYS[schedule.decay_type].name.lower()
    return FromRate(curve, schedule.min_lr, schedule.decay_steps, k, q)


def highest(schedule: Schedule) -> float:
    """The highest rate of a schedule.

    Raises:
        ValueError: it grows without end.
    """
    _, (rate, step) = bounds_of(schedule)
    if step >= MAX_STEP - 1:  # the last ones that are looked at
        raise ValueError(f"{shown(schedule)} grows without end, and has no highest rate: give rewarm(to=...)")
    return rate
