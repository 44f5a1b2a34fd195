"""Schedules on a device: a `Schedule` lowered to a segment table that the kernels evaluate.

The table is device memory that is edited in place and never replaced, so that kernels, and graphs that captured
them, may keep a pointer to it. Edits read the step counter on the device: none of them visits the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nexus.schedules import WSD, Schedule
from nexus.schedules.curves import MAX_LAYERS, Curve, Layer, Segment, check_room

_COLUMNS = len(Segment._fields)
_START, _PERIOD, _HIGH = (Segment._fields.index(name) for name in ("start", "period", "high"))  # columns
_STABLE, _DECAY, _DONE = 2, 3, 4  # rows of a lowered WSD, after the layer's own
# A constant is the same whatever its period. So the periods of a WSD's two plateaus keep what has been done to it:
# 1 + updates by which the stable phase was extended, and 1 + whether the decay was begun by hand.


def lower(schedule: Schedule, device: torch.device) -> Tensor:
    """The layers as a float64 tensor (layers, rows, 9), as csrc/schedule.h has it.

    The first row of a layer is (op, segments, repeat_start, repeat_length), those after it are its segments, and
    then come its samples.

    Raises:
        ValueError: a row has an unknown curve (the evaluators make NaN of one), or there are too many layers, rows or
            samples.
    """
    layers = schedule.layers()
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"{schedule!r} has {len(layers)} layers; {MAX_LAYERS} are allowed")
    rows = [_rows(schedule, layer) for layer in layers]
    table = torch.zeros(len(rows), max(map(len, rows)), _COLUMNS, dtype=torch.float64, device="cpu")
    for target, source in zip(table, rows, strict=True):
        target[: len(source)] = torch.tensor(source, dtype=torch.float64, device="cpu")
    return table.to(device)


def _rows(schedule: Schedule, layer: Layer) -> list[Sequence[float]]:
    segments, samples = layer.segments, layer.samples
    unknown = [row.curve for row in segments if row.curve not in set(Curve)]
    if unknown:
        known = ", ".join(f"{curve:d} ({curve.name})" for curve in Curve)
        raise ValueError(f"{schedule!r} has a segment of an unknown curve, {unknown[0]!r}; it must be one of {known}")
    check_room(f"{type(schedule).__name__} has", layer)
    header = [layer.op, len(segments), layer.repeat_start, layer.repeat_length] + [0.0] * (_COLUMNS - 4)
    first = (1 + len(segments)) * _COLUMNS  # of the samples, in the layer's numbers
    placed = [row._replace(k=row.k + first) if row.curve == Curve.SAMPLED else row for row in segments]
    kept = [*samples, *[0.0] * (-len(samples) % _COLUMNS)]
    return [header, *placed, *(kept[i : i + _COLUMNS] for i in range(0, len(kept), _COLUMNS))]


class ScheduleTable:
    """A schedule on a device, with the changes that its run has brought.

    Args:
        schedule: what the user asked for; it stays as it is.
        device: where `rows` lives.
    """

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.schedule = schedule
        self.rows = lower(schedule, device)

    def begin_decay(self, completed: Tensor, rate: Tensor) -> None:
        """Let the decay of a WSD begin now; one that has begun goes on.

        Args:
            completed: 0-dim int64 tensor on the table's device, the number of completed updates.
            rate: 0-dim float64 tensor, that of this moment: what an evaluator makes of `rows`.
        """
        schedule = self._wsd("begin_decay")
        now = completed.to(torch.float64)
        begun = _decaying(self.rows, schedule, now, rate)
        self.rows.copy_(torch.where(now < self.rows[0, _DECAY, _START], begun, self.rows))

    def extend_stable(self, n: int, completed: Tensor) -> None:
        """Make the stable phase of a WSD `n` updates longer; once the decay has begun, this does nothing.

        Args:
            n: updates, 0 or more.
            completed: as in `begin_decay`.

        Raises:
            ValueError: the stable phase is open-ended, or `n` is negative.
        """
        self.check_extend_stable(n)
        waits = completed.to(torch.float64) < self.rows[0, _DECAY, _START]
        _extend(self.rows, waits * int(n))

    def check_extend_stable(self, n: int) -> None:
        """Raise as `extend_stable` does."""
        self._wsd("extend_stable").extend_stable(n)

    def edits(self) -> dict[str, Any]:
        """What `begin_decay` and `extend_stable` have changed, in plain types. Reads the device."""
        if not isinstance(self.schedule, WSD):
            return {}
        now = self.rows.cpu()
        edits: dict[str, Any] = {}
        if now[0, _STABLE, _PERIOD] > 1:
            edits["extended"] = int(now[0, _STABLE, _PERIOD]) - 1
        if now[0, _DONE, _PERIOD] > 1:
            edits |= {"decay_start": int(now[0, _DECAY, _START]), "decay_from": float(now[0, _DECAY, _HIGH])}
        return edits

    def replace(self, schedule: Schedule) -> None:
        """Take another schedule, of as many segments, in the same memory."""
        self.schedule = schedule
        self.rows.copy_(lower(schedule, torch.device("cpu")))

    def restore(self, edits: dict[str, Any]) -> None:
        """Bring the table to its schedule with these `edits`; none of them: as it was at first."""
        rows = lower(self.schedule, torch.device("cpu"))
        if "extended" in edits:
            _extend(rows, edits["extended"])
        if "decay_start" in edits:
            start = rows.new_tensor(edits["decay_start"])
            rows = _decaying(rows, self._wsd("begin_decay"), start, edits["decay_from"])
        self.rows.copy_(rows)

    def _wsd(self, verb: str) -> WSD:
        if not isinstance(self.schedule, WSD):
            raise TypeError(f"{verb} needs a WSD schedule, this one is {self.schedule!r}")
        return self.schedule


def _extend(rows: Tensor, n: Tensor | int) -> None:
    rows[0, _DECAY:, _START] += n
    rows[0, _STABLE, _PERIOD] += n


def _decaying(rows: Tensor, schedule: WSD, start: Tensor, rate: Tensor | float) -> Tensor:
    """A copy of a WSD's rows, whose decay begins at `start` from `rate`."""
    rows = rows.clone()
    rows[0, _STABLE, _START] = torch.minimum(rows[0, _STABLE, _START], start)
    rows[0, _DECAY, _START] = start
    rows[0, _DECAY, _HIGH] = rate
    rows[0, _DONE, _START] = start + schedule.decay_steps
    rows[0, _DONE, _PERIOD] = 2.0
    return rows
