"""Schedules on a device: a `Schedule` lowered to a segment table that the kernels evaluate.

The table is device memory that is edited in place and never replaced, so that kernels, and graphs that captured
them, may keep a pointer to it. Edits read the step counter on the device: none of them visits the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus.schedules import WSD, Schedule
from nexus.schedules.curves import WEIGHTS

_START, _LENGTH, _HIGH = 1, 2, 3  # columns of a table
_STABLE, _DECAY, _DONE = 1, 2, 3  # rows of a lowered WSD
# A constant is the same whatever its length. So the lengths of a WSD's two plateaus keep what has been done to it:
# 1 + updates by which the stable phase was extended, and 1 + whether the decay was begun by hand.


def lower(schedule: Schedule, device: torch.device) -> Tensor:
    """The segments as a float64 tensor of rows (curve, start, length, high, low).

    Raises:
        ValueError: a row has an unknown curve. (The evaluators make NaN of one.)
    """
    segments = schedule.segments()
    unknown = [segment.curve for segment in segments if segment.curve not in WEIGHTS]
    if unknown:
        known = ", ".join(f"{curve:d} ({curve.name})" for curve in WEIGHTS)
        raise ValueError(f"{schedule!r} has a segment of an unknown curve, {unknown[0]!r}; it must be one of {known}")
    return torch.tensor(segments, dtype=torch.float64, device="cpu").to(device)


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
        self.rows.copy_(torch.where(now < self.rows[_DECAY, _START], begun, self.rows))

    def extend_stable(self, n: int, completed: Tensor) -> None:
        """Make the stable phase of a WSD `n` updates longer; once the decay has begun, this does nothing.

        Args:
            n: updates, 0 or more.
            completed: as in `begin_decay`.

        Raises:
            ValueError: the stable phase is open-ended, or `n` is negative.
        """
        self.check_extend_stable(n)
        waits = completed.to(torch.float64) < self.rows[_DECAY, _START]
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
        if now[_STABLE, _LENGTH] > 1:
            edits["extended"] = int(now[_STABLE, _LENGTH]) - 1
        if now[_DONE, _LENGTH] > 1:
            edits |= {"decay_start": int(now[_DECAY, _START]), "decay_from": float(now[_DECAY, _HIGH])}
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
    rows[_DECAY:, _START] += n
    rows[_STABLE, _LENGTH] += n


def _decaying(rows: Tensor, schedule: WSD, start: Tensor, rate: Tensor | float) -> Tensor:
    """A copy of a WSD's rows, whose decay begins at `start` from `rate`."""
    rows = rows.clone()
    rows[_STABLE, _START] = torch.minimum(rows[_STABLE, _START], start)
    rows[_DECAY, _START] = start
    rows[_DECAY, _HIGH] = rate
    rows[_DONE, _START] = start + schedule.decay_steps
    rows[_DONE, _LENGTH] = 2.0
    return rows
