"""The rows that a schedule is lowered to, and that the evaluators walk."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

NEVER = 2**62  # start of a segment that no step reaches; also the cap of a cycle's length. Fits an int64.
MAX_SEGMENTS = 65_536  # rows of one schedule


class Curve(IntEnum):
    """What a segment's weight is, at `p = position / length`."""

    CONSTANT = 0  # 1
    RISE = 1  # p
    LINEAR = 2  # 1 - p
    COSINE = 3  # (1 + cos(pi p)) / 2 = cos(pi p / 2)^2
    SQRT = 4  # 1 - sqrt(p)


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
