"""What a plateau has heard, in the last layer of its table, and what a report changes there.

The five columns of the layer's first row that evaluators do not read hold the best metric so far, the bad reports
since, the reports that are left of the cooldown, and the sum and the count of the reports that wait for their mean.
The layer's one segment is a constant: its value is the factor, and its number k, which no evaluator uses, the number
of reports. All in float64, in operations that read nothing back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nexus.schedules.curves import Segment
from nexus.schedules.plateau import ReduceOnPlateau

_STATE = slice(4, 9)  # columns of the first row
_FACTOR, _COUNT = (Segment._fields.index(name) for name in ("high", "k"))  # of the segment's

NAMES = ("best", "bad", "cooldown", "sum", "waiting", "factor", "reports", "base")
"""What `state` holds; `base` is what the factor is without a reduction."""


def beginning(
    schedule: ReduceOnPlateau, base: float, best: float | None = None, bad: int = 0, cooldown: int = 0
) -> list[float]:
    """The state of a plateau that has heard nothing, or of a scheduler of torch's that stands there."""
    worst = math.inf if schedule.mode == "min" else -math.inf
    return [worst if best is None else best, float(bad), float(cooldown), 0.0, 0.0, base, 0.0, base]


def state(layer: Tensor, base: float) -> list[float]:
    """All of it, by `NAMES`, of a layer (float64 (rows, 9)). Reads the device."""
    read = layer[:2].cpu()
    return [*read[0, _STATE].tolist(), float(read[1, _FACTOR]), float(read[1, _COUNT]), base]


def set_state(layer: Tensor, values: Sequence[float], base: float) -> None:
    """The reverse; a factor of another base becomes one of this."""
    *own, factor, heard, old = values
    for column, value in enumerate(own, _STATE.start):
        layer[0, column].fill_(value)
    layer[1, _FACTOR].fill_(factor if base == old else factor / old * base)
    layer[1, _COUNT].fill_(heard)


def report(layer: Tensor, schedule: ReduceOnPlateau, metric: Tensor, rate: Tensor) -> None:
    """Hear a metric, and lower the factor if it is time, as torch's `ReduceLROnPlateau.step` does.

    Args:
        layer: float64 (rows, 9), written in place.
        schedule: whose layer this is.
        metric: 0-dim float64.
        rate: 0-dim float64, the rate of this moment without the factor.
    """
    waits = layer[0, _STATE].clone()
    waits[3] += metric
    waits[4] += 1.0
    best, bad, cooldown, total, waiting = waits.unbind()
    current = total / waiting
    better = _is_better(schedule, current, best)
    cools = cooldown > 0.0
    bad = torch.where(better | cools, 0.0, bad + 1.0)
    reduces = bad > schedule.patience
    bad = torch.where(reduces, 0.0, bad)
    cooldown = torch.where(reduces, float(schedule.cooldown), torch.where(cools, cooldown - 1.0, cooldown))
    none = torch.zeros_like(best)
    heard = torch.stack([torch.where(better, current, best), bad, cooldown, none, none])

    factor = layer[1, _FACTOR]
    lowered = factor * schedule.factor
    least = torch.where(rate > 0.0, schedule.min_lr / rate, lowered)
    lowered = torch.maximum(lowered, least)
    counts = waiting >= schedule.every
    reduces = counts & reduces & ((factor - lowered) * rate > schedule.eps)
    layer[0, _STATE].copy_(torch.where(counts, heard, waits))
    factor.copy_(torch.where(reduces, lowered, factor))
    layer[1, _COUNT].add_(1.0)


def _is_better(schedule: ReduceOnPlateau, current: Tensor, best: Tensor) -> Tensor:
    threshold = schedule.threshold
    if schedule.mode == "min":
        return current < (best * (1.0 - threshold) if schedule.threshold_mode == "rel" else best - threshold)
    return current > (best * (threshold + 1.0) if schedule.threshold_mode == "rel" else best + threshold)
