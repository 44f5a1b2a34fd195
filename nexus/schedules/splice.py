"""Layers of several schedules, one after the other, as the layers of one: how a join is lowered.

A part runs on its own clock from its boundary on. Its rows are copied with later starts and cut at the next boundary,
so that each step has the curve, the place and the bits that it has in the part.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from nexus.arguments import MAX_STEP
from nexus.schedules.curves import (
    MAX_LAYERS,
    MAX_SEGMENTS,
    NEVER,
    Curve,
    Layer,
    Op,
    Segment,
    check_room,
    level,
    start,
)

_NEUTRAL = {
    Op.TIMES: level(0, 1.0),
    Op.PLUS: level(0, 0.0),
    Op.MIN: level(0, float("inf")),
    Op.MAX: level(0, float("-inf")),
}
"""What leaves the value of the layers before it as it is."""

_FOLDS = [op for op in Op if op != Op.FIRST]


def spliced(parts: Sequence[tuple[Layer, ...]], boundaries: Sequence[int]) -> tuple[Layer, ...]:
    """The layers of which those of `parts[i]` are in force from `boundaries[i - 1]` on, on their own clock.

    Raises:
        ValueError: the parts have no common sequence of at most four layers, or there are too many rows or samples.
    """
    sequence = _common([tuple(layer.op for layer in part) for part in parts])
    edges = [0, *boundaries, NEVER]
    placed = [
        (begin, end, _placed(part, sequence))
        for part, begin, end in zip(parts, edges[:-1], edges[1:], strict=True)
        if begin < end
    ]
    return tuple(
        _one_layer(op, [(begin, end, part[i]) for begin, end, part in placed]) for i, op in enumerate(sequence)
    )


def endless(layers: Sequence[Layer], length: int) -> tuple[Layer, ...]:
    """The layers whose first `length` steps come again and again."""
    return tuple(_shortest(layer._replace(repeat_start=0, repeat_length=length)) for layer in map(_shortest, layers))


def _common(sequences: list[tuple[Op, ...]]) -> tuple[Op, ...]:
    """The shortest sequence of operations that has each of these in it, in order."""
    for count in range(MAX_LAYERS):
        for rest in product(_FOLDS, repeat=count):
            if all(_positions(each, (Op.FIRST, *rest)) is not None for each in sequences):
                return (Op.FIRST, *rest)
    given = "; ".join(sorted({" ".join(op.name for op in each[1:]) or "none" for each in sequences}))
    raise ValueError(
        f"joined schedules must fit a common sequence of at most {MAX_LAYERS - 1} operations after the first layer, "
        f"got {given}; join before you multiply, add or clip"
    )


def _positions(ops: tuple[Op, ...], sequence: tuple[Op, ...]) -> list[int] | None:
    """Where in `sequence` each of `ops` is, in order; None if they are not all there."""
    positions: list[int] = []
    for op in ops:
        first = positions[-1] + 1 if positions else 0
        if op not in sequence[first:]:
            return None
        positions.append(sequence.index(op, first))
    return positions


def _placed(part: tuple[Layer, ...], sequence: tuple[Op, ...]) -> list[Layer]:
    """The layers of a part where `sequence` has their operations, and neutral ones elsewhere."""
    own = dict(zip(_positions(tuple(layer.op for layer in part), sequence) or [], part, strict=True))
    return [own[i] if i in own else Layer((_NEUTRAL[op],), op) for i, op in enumerate(sequence)]


def _one_layer(op: Op, parts: list[tuple[int, int, Layer]]) -> Layer:
    rows: list[Segment] = []
    samples: tuple[float, ...] = ()
    found: dict[tuple[float, ...], int] = {}  # where the samples of a part are among all
    for begin, end, part in parts:
        layer = _shortest(part)
        if layer.samples not in found:
            found[layer.samples] = len(samples)
            samples += layer.samples
        first = found[layer.samples]
        for row in _within(layer, end - begin) if end < NEVER else layer.segments:
            if begin + row.start <= MAX_STEP:
                k = row.k + first if row.curve == Curve.SAMPLED else row.k
                rows.append(row._replace(start=begin + row.start, k=k))
    begin, _, _ = parts[-1]
    joined = Layer(tuple(rows), op, start(begin + layer.repeat_start), layer.repeat_length, samples)
    check_room("the joined schedules have", joined)
    return joined


def _shortest(layer: Layer) -> Layer:
    """The same layer without rows that are never in force, and without a repeat that a row's period does."""
    segments = layer.segments
    starts = [row.start for row in segments[1:]] + [NEVER]
    repeats = layer.repeat_start <= MAX_STEP
    limit = layer.repeat_start + layer.repeat_length if repeats else NEVER
    rows = tuple(row for row, after in zip(segments, starts, strict=True) if row.start < min(after, limit))
    layer = layer._replace(segments=rows)
    last = rows[-1]
    if not repeats or last.start > layer.repeat_start:
        return layer
    if last.curve == Curve.CONSTANT:
        return layer._replace(repeat_start=NEVER, repeat_length=1)
    if last.start < layer.repeat_start or (last.period < layer.repeat_length and layer.repeat_length % last.period):
        return layer
    once = last._replace(period=min(last.period, layer.repeat_length))
    return layer._replace(segments=(*rows[:-1], once), repeat_start=NEVER, repeat_length=1)


def _within(layer: Layer, length: int) -> list[Segment]:
    """The rows of the first `length` steps, with repeats as rows of their own."""
    begin = layer.repeat_start
    if begin >= length:
        return [row for row in layer.segments if row.start < length]
    rows = [row for row in layer.segments if row.start < begin]
    cycle = [row for row in layer.segments if row.start >= begin]
    if not cycle or cycle[0].start > begin:
        cycle = _resumed(rows[-1], begin, cycle[0].start if cycle else begin + layer.repeat_length) + cycle
    count = -(-(length - begin) // layer.repeat_length)
    if count * len(cycle) > MAX_SEGMENTS:
        raise ValueError(
            f"{count:,} repeats of {len(cycle):,} rows are too many for a layer of {MAX_SEGMENTS:,} rows; at most "
            f"{MAX_SEGMENTS // len(cycle):,} repeats are allowed, or repeat() without an end as the last part"
        )
    for i in range(count):
        rows += [row._replace(start=row.start + i * layer.repeat_length) for row in cycle]
    return [row for row in rows if row.start < length]


def _resumed(row: Segment, step: int, end: int) -> list[Segment]:
    """A row from a step in its midst on, up to `end`."""
    into = (step - row.start) % row.period
    if row.curve == Curve.CONSTANT or into == 0:
        return [row._replace(start=step)]
    if not row.offset.is_integer():
        raise ValueError(f"a layer that repeats from the midst of {row!r} must have a whole offset to be joined")
    wrapped = row._replace(start=step + row.period - into)
    resumed = row._replace(start=step, period=NEVER, offset=row.offset + into)
    return [resumed, wrapped] if wrapped.start < end else [resumed]
