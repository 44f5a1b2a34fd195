"""The curves of schedules: what an oracle's weight is, and the rows that evaluators walk."""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import NamedTuple

from nexus.arguments import MAX_STEP, check_number

NEVER = 2**62  # start of a segment that no step reaches; also the cap of a cycle's length. Fits an int64.
MAX_SEGMENTS = 65_536  # rows of one layer
MAX_LAYERS = 4
MAX_SAMPLES = 2**20  # 8 MiB on the device
LARGEST = sys.float_info.max  # the rate that stands for any higher one


class Curve(IntEnum):
    """What the weight of a segment is, at its place p, with its numbers k and q. csrc/schedule.h has the same."""

    CONSTANT = 0  # 1
    RISE = 1  # p
    LINEAR = 2  # 1 - p
    COSINE = 3  # ((1 + cos(pi p**k)) / 2)**q
    SQRT = 4  # 1 - sqrt(p)
    POWER = 5  # (1 - p**k)**q
    EXPONENTIAL = 6  # (q**p - k) / (1 - k): to 0 at p = 1 where k is q
    STAIRCASE = 7  # q**floor(p)
    INVERSE = 8  # (1 + p)**-q
    LOG = 9  # k log(p)
    TANH = 10  # (1 - tanh(k (1 - p) + q p)) / 2
    SAMPLED = 11  # between the samples at floor(p) and the next one; the first is number k of the layer's, of q


class Op(IntEnum):
    """What becomes of a layer's value and the value of those before it. csrc/schedule.h has the same numbers."""

    FIRST = 0  # there are none
    TIMES = 1
    PLUS = 2
    MIN = 3
    MAX = 4


def power(x: float, k: float) -> float:
    """x**k, without the math library where IEEE operations give it, and infinite where it is too large."""
    if k == 1.0:
        return x
    if k == 0.5:
        return math.sqrt(x)
    if k == 2.0:
        return x * x
    try:
        return math.pow(x, k)
    except OverflowError:
        return math.inf


def _half_cosine(p: float) -> float:
    # (1 + cos(pi p)) / 2 by its half angle: no difference of nearly equal numbers near the end, so that evaluators
    # whose cosines differ in their last bit agree to the last bits of the weight too.
    root = math.cos(0.5 * math.pi * p)
    return root * root


WEIGHTS: dict[Curve, Callable[[float, float, float], float]] = {
    Curve.CONSTANT: lambda p, k, q: 1.0,
    Curve.RISE: lambda p, k, q: p,
    Curve.LINEAR: lambda p, k, q: 1.0 - p,
    Curve.COSINE: lambda p, k, q: power(_half_cosine(power(p, k)), q),
    Curve.SQRT: lambda p, k, q: 1.0 - math.sqrt(p),
    Curve.POWER: lambda p, k, q: power(1.0 - power(p, k), q),
    Curve.EXPONENTIAL: lambda p, k, q: (power(q, p) - k) / (1.0 - k),
    Curve.STAIRCASE: lambda p, k, q: power(q, float(math.floor(p))),
    Curve.INVERSE: lambda p, k, q: 1.0 / power(1.0 + p, q),
    Curve.LOG: lambda p, k, q: k * math.log(p),
    Curve.TANH: lambda p, k, q: 0.5 * (1.0 - math.tanh(k * (1.0 - p) + q * p)),
}
"""The oracle of every evaluator's weight, in float64, of (p, k, q). SAMPLED needs the samples: see `sampled`."""


def bounded(rate: float) -> float:
    """The rate, or the largest number that there is: infinity times 0 would be NaN."""
    return min(rate, LARGEST)


FOLDS: dict[Op, Callable[[float, float], float]] = {
    Op.FIRST: lambda before, value: value,
    Op.TIMES: lambda before, value: bounded(before * value),
    Op.PLUS: lambda before, value: bounded(before + value),
    Op.MIN: lambda before, value: value if value < before else before,
    Op.MAX: lambda before, value: value if value > before else before,
}

DECAYS = {"linear": Curve.LINEAR, "cosine": Curve.COSINE, "sqrt": Curve.SQRT}
"""The curves from 1 to 0, by their names in arguments."""


class Segment(NamedTuple):
    """One row of a layer.

    In force at step `t` is the last segment with `start <= t`, at the place

        p = ((t - start) mod period + offset) / span

    with the value `low + weight(p) * (high - low)`; `high` may be the smaller one.
    """

    curve: Curve
    start: int
    period: int
    offset: float
    span: float
    high: float
    low: float
    k: float
    q: float


def segment(
    curve: Curve,
    start: int,
    period: int,
    high: float,
    low: float = 0.0,
    *,
    offset: float = 0.0,
    span: float | None = None,
    k: float = 1.0,
    q: float = 1.0,
) -> Segment:
    """A row that goes once through its curve in a period, unless `span` says otherwise."""
    return Segment(curve, start, period, offset, float(period) if span is None else span, high, low, k, q)


def level(start: int, value: float) -> Segment:
    """A row of one value."""
    return segment(Curve.CONSTANT, start, 1, value)


def line(start: int, period: int, first: float, last: float) -> Segment:
    """A row from the value `first` to `last`, whichever is the higher one."""
    if first < last:
        return segment(Curve.RISE, start, period, last, first)
    return segment(Curve.LINEAR, start, period, first, last)


class Layer(NamedTuple):
    """Segments by ascending start, the first of which starts at 0.

    From `repeat_start` on, what is in the `repeat_length` steps from there comes again and again.
    """

    segments: tuple[Segment, ...]
    op: Op = Op.FIRST
    repeat_start: int = NEVER
    repeat_length: int = 1
    samples: tuple[float, ...] = ()


def check_room(whose: str, layer: Layer) -> None:
    """Raise where a layer has more rows or samples than its table may have."""
    counts = {"rows": (len(layer.segments), MAX_SEGMENTS), "samples": (len(layer.samples), MAX_SAMPLES)}
    for what, (count, most) in counts.items():
        if count > most:
            raise ValueError(f"{whose} {count:,} {what} in a layer; {most:,} are allowed")


def sampled(samples: Sequence[float], first: int, count: int, p: float) -> float:
    """The value at place p of `count` samples, the last of which stays."""
    place = min(max(math.floor(p), 0), count - 1)
    value, following = samples[first + place], samples[first + min(place + 1, count - 1)]
    rest = p - place
    return value + rest * (following - value) if 0.0 < rest < 1.0 else value


def value_of(layers: Sequence[Layer], step: int) -> float:
    """The value of a fold of layers at a step: the oracle of every evaluator."""
    value = 0.0
    for layer in layers:
        t = step
        if t >= layer.repeat_start:
            t = layer.repeat_start + (t - layer.repeat_start) % layer.repeat_length
        row = layer.segments[bisect_right(layer.segments, t, key=_start_of) - 1]
        p = (float((t - row.start) % row.period) + row.offset) / row.span
        if row.curve == Curve.SAMPLED:
            weight = sampled(layer.samples, int(row.k), int(row.q), p)
        else:
            weight = WEIGHTS[row.curve](p, row.k, row.q)
        value = FOLDS[layer.op](value, bounded(row.low + weight * (row.high - row.low)))
    return value


def _start_of(row: Segment) -> int:
    return row.start


def between(low: float, high: float, curve: Curve, p: float, k: float = 1.0, q: float = 1.0) -> float:
    """A rate, in the order of operations of every evaluator."""
    return low + WEIGHTS[curve](p, k, q) * (high - low)


def start(step: int) -> int:
    """Where a segment begins, exact in a float64 table too."""
    return step if step <= MAX_STEP else NEVER


def checked_rates(peak_lr: object, min_lr: object) -> dict[str, float]:
    """Both rates, as numbers with 0 <= min_lr <= peak_lr; raises with the name of the one that is not."""
    peak, low = check_number("peak_lr", peak_lr, positive=True), check_number("min_lr", min_lr)
    if low > peak:
        raise ValueError(f"min_lr must be a number from 0 to peak_lr={peak!r}, got {low!r}")
    return {"peak_lr": peak, "min_lr": low}
