"""The lowest and the highest rate of a schedule, as far as they are where its pieces begin and end."""

from __future__ import annotations

from collections.abc import Iterator

from nexus.arguments import MAX_STEP
from nexus.schedules.base import Schedule, layers_of, once
from nexus.schedules.curves import MAX_SAMPLES, Curve, Layer

_GRID = 4096  # steps at which several layers are looked at, evenly spread
Extreme = tuple[float, int]
"""A rate, and the first of the steps looked at that has it."""


@once
def bounds_of(schedule: Schedule) -> tuple[Extreme, Extreme]:
    """The lowest and the highest rate, each with a step that has it.

    Every curve is monotonic between the ends of its piece, so that these are the bounds of what is one layer. Of a
    product or a sum of layers, a grid of steps is looked at, too; between them it may go beyond. Looked for once a
    schedule.

    >>> from nexus.schedules import WSD
    >>> bounds_of(WSD(warmup_steps=2, stable_steps=10, decay_steps=5, peak_lr=0.5))
    ((0.0, 0), (0.5, 2))
    """
    layers = layers_of(schedule)
    last = (schedule.length or MAX_SAMPLES) if len(layers) > 1 else 0
    grid = range(0, last + 1, max(1, last // _GRID))
    steps = sorted({*grid, MAX_STEP, *(step for layer in layers for step in _ends(layer))})
    rates = [(schedule(step), step) for step in steps if 0 <= step <= MAX_STEP]
    return min(rates), max(rates, key=lambda rate: (rate[0], -rate[1]))


def _ends(layer: Layer) -> Iterator[int]:
    """Steps at the ends of a layer's pieces, and about its extreme samples."""
    starts = [row.start for row in layer.segments[1:]] + [MAX_STEP]
    for row, following in zip(layer.segments, starts, strict=True):
        yield from (row.start, min(row.start + row.period, following) - 1, following - 1)
        if row.curve == Curve.SAMPLED:
            samples = layer.samples[int(row.k) : int(row.k) + int(row.q)]
            for sample in (min(samples), max(samples)):
                yield row.start + round(samples.index(sample) * row.span - row.offset)
    if layer.repeat_start <= MAX_STEP:
        yield from (layer.repeat_start + layer.repeat_length - 1, layer.repeat_start + layer.repeat_length)
