"""The curves of schedules: what an oracle's weight is, and the rows that evaluators walk."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from nexus.arguments import MAX_STEP, check_number

NEVER = 2**62  # start of a segment that no step reaches; also the cap of a cycle's length. Fits an int64.
MAX_SEGMENTS = 65_536  # rows of one schedule


class Curve(IntEnum):
    """What a segment's weight is, at `p = position / length`. csrc/schedule.h has the same numbers."""

    CONSTANT = 0
    RISE = 1
    LINEAR = 2
    COSINE = 3
    SQRT = 4


def _half_cosine(p: float) -> float:
    # (1 + cos(pi p)) / 2 by its half angle: no difference of nearly equal numbers near the end, so that evaluators
    # whose cosines differ in their last bit agree to the last bits of the weight too.
    root = math.cos(0.5 * math.pi * p)
    return root * root


WEIGHTS: dict[Curve, Callable[[float], float]] = {
    Curve.CONSTANT: lambda p: 1.0,
    Curve.RISE: lambda p: p,
    Curve.LINEAR: lambda p: 1.0 - p,
    Curve.COSINE: _half_cosine,
    Curve.SQRT: lambda p: 1.0 - math.sqrt(p),
}
"""The oracle of every evaluator's weight, in float64."""

DECAYS = {"linear": Curve.LINEAR, "cosine": Curve.COSINE, "sqrt": Curve.SQRT}
"""The curves from 1 to 0, by their names in arguments."""


class Segment(NamedTuple):
    """One row of a lowered schedule.

    In force at step `t` is the last segment with `start <= t`. It repeats until the next one begins:
    `position = (t - start) mod length`. Its value is `low + weight(position / length) * (high - low)`.
    """

    curve: Curve
    start: int
    length: int
    high: float
    low: float


def between(low: float, high: float, curve: Curve, p: float) -> float:
    """A rate, in the order of operations of every evaluator."""
    return low + WEIGHTS[curve](p) * (high - low)


def start(step: int) -> int:
    """Where a segment begins, exact in a float64 table too."""
    return step if step <= MAX_STEP else NEVER


def checked_rates(peak_lr: object, min_lr: object) -> dict[str, float]:
    """Both rates, as numbers with 0 <= min_lr <= peak_lr; raises with the name of the one that is not."""
    peak, low = check_number("peak_lr", peak_lr, positive=True), check_number("min_lr", min_lr)
    if low > peak:
        raise ValueError(f"min_lr must be a number from 0 to peak_lr={peak!r}, got {low!r}")
    return {"peak_lr": peak, "min_lr": low}
