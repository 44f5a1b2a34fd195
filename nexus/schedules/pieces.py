"""Pieces of schedules that begin at whatever rate there is: what an edit in a live run puts in force."""

from __future__ import annotations

from typing import NamedTuple

from nexus.schedules.arc import ENDING, Arc
from nexus.schedules.base import Schedule, layers_of
from nexus.schedules.bounds import GRID
from nexus.schedules.compose import join
from nexus.schedules.constant import Constant
from nexus.schedules.curves import MAX_SAMPLES, Curve, Layer, value_of
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
        arc = Arc(self.curve, rate, self.to, float(self.steps), k=self.k, q=self.q)
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
    """The highest rate of a schedule; of several layers, at the ends of their rows and on a grid of 4096 steps."""
    layers = layers_of(schedule)
    if len(layers) == 1:
        return max(map(max, _ends(layers[0])))
    edges = {row.start + more for layer in layers for row in layer.segments for more in (-1, 0, row.period - 1)}
    last = schedule.length or MAX_SAMPLES
    steps = {*range(0, last + 1, max(1, last // GRID)), *(edge for edge in edges if 0 <= edge <= last)}
    return max(value_of(layers, step) for step in steps)


def _ends(layer: Layer) -> list[tuple[float, ...]]:
    """The rates between which each row goes, or all samples of one that has samples."""
    starts = [row.start for row in layer.segments[1:]] + [None]
    found: list[tuple[float, ...]] = []
    for row, after in zip(layer.segments, starts, strict=True):
        if row.start == after:
            continue  # never in force
        if row.curve == Curve.SAMPLED:
            samples = layer.samples[int(row.k) : int(row.k) + int(row.q)]
            found.append(tuple(row.low + each * (row.high - row.low) for each in samples))
        elif row.curve == Curve.LOG or row.span < 1.0:
            found.append((value_of([layer], row.start),))
        else:
            found.append((row.high,) if row.curve == Curve.CONSTANT else (row.high, row.low))
    return found
