"""Schedules on a device: a `Schedule` lowered to a segment table that the kernels evaluate.

The table is device memory that is edited in place and never replaced, so that kernels, and graphs that captured
them, may keep a pointer to it. Edits read the step counter on the device: none of them visits the host. A table has
room for more rows, and where it is small for more layers, than its schedule has. Those are never in force.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus.arguments import shown
from nexus.schedules import WSD, ReduceOnPlateau, Schedule, reports
from nexus.schedules.compose import join
from nexus.schedules.curves import MAX_LAYERS, Curve, Layer, Op, Segment, check_room, level
from nexus.schedules.edits import edited
from nexus.schedules.pieces import FromRate
from nexus.schedules.plateau import inner_of

_COLUMNS = len(Segment._fields)
_START, _PERIOD, _HIGH = (Segment._fields.index(name) for name in ("start", "period", "high"))  # columns
_REPEAT_START = 2  # column of a layer's first row
_STABLE, _DECAY, _DONE = 2, 3, 4  # rows of a lowered WSD, after the layer's own
# A constant is the same whatever its period. So the periods of a WSD's two plateaus keep what has been done to it:
# 1 + updates by which the stable phase was extended, and 1 + whether the decay was begun by hand.

CAPACITY = 16
"""Rows of a layer for which a table has room at least."""
_SMALL = 1024  # rows of a layer, up to which a table has room for all layers


def lower(schedule: Schedule, device: torch.device) -> Tensor:
    """The layers as a float64 tensor (layers, rows, 9), as csrc/schedule.h has it.

    The first row of a layer is (op, segments, repeat_start, repeat_length), those after it are its segments, and
    then come its samples.

    Raises:
        ValueError: a row has an unknown curve (the evaluators make NaN of one), or there are too many layers, rows or
            samples.
    """
    layers = _layers(schedule)
    return _placed(layers, len(layers), max(map(_height, layers)))[0].to(device)


def _layers(schedule: Schedule) -> tuple[Layer, ...]:
    """The layers of a schedule, checked."""
    layers = schedule.layers()
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"{schedule!r} has {len(layers)} layers; {MAX_LAYERS} are allowed")
    for layer in layers:
        unknown = [row.curve for row in layer.segments if row.curve not in set(Curve)]
        if unknown:
            known = ", ".join(f"{curve:d} ({curve.name})" for curve in Curve)
            given = f"{unknown[0]!r}; it must be one of {known}"
            raise ValueError(f"{schedule!r} has a segment of an unknown curve, {given}")
        check_room(f"{type(schedule).__name__} has", layer)
    return layers


def _height(layer: Layer) -> int:
    return 1 + len(layer.segments) + -(-len(layer.samples) // _COLUMNS)


def _placed(layers: Sequence[Layer], count: int, height: int) -> tuple[Tensor, Tensor]:
    """The layers as `count` layers of `height` rows, and what becomes later with the schedule's beginning: by 1."""
    neutral = Layer((level(0, 1.0),), Op.TIMES)
    table = torch.zeros(count, height, _COLUMNS, dtype=torch.float64, device="cpu")
    later = torch.zeros_like(table)
    for i, layer in enumerate([*layers, *[neutral] * (count - len(layers))]):
        rows = _rows(layer)
        table[i, : len(rows)] = torch.tensor(rows, dtype=torch.float64, device="cpu")
        later[i, 0, _REPEAT_START] = 1.0
        later[i, 1 : 1 + len(layer.segments), _START] = 1.0
    return table, later


def _rows(layer: Layer) -> list[Sequence[float]]:
    segments, samples = layer.segments, layer.samples
    header = [layer.op, len(segments), layer.repeat_start, layer.repeat_length] + [0.0] * (_COLUMNS - 4)
    first = (1 + len(segments)) * _COLUMNS  # of the samples, in the layer's numbers
    placed = [row._replace(k=row.k + first) if row.curve == Curve.SAMPLED else row for row in segments]
    kept = [*samples, *[0.0] * (-len(samples) % _COLUMNS)]
    return [header, *placed, *(kept[i : i + _COLUMNS] for i in range(0, len(kept), _COLUMNS))]


def layers_in(rows: Tensor) -> list[Layer]:
    """The layers of a table, for the oracle. Reads the device."""
    layers: list[Layer] = []
    for (op, count, repeat_start, repeat_length, *_), *others in rows.tolist():
        segments = tuple(
            Segment(Curve(int(curve)), int(start), int(period), *numbers)
            for curve, start, period, *numbers in others[: int(count)]
        )
        has_samples = any(row.curve == Curve.SAMPLED for row in segments)  # at places in all numbers of the layer
        samples = tuple(rows[len(layers)].flatten().tolist()) if has_samples else ()
        layers.append(Layer(segments, Op(int(op)), int(repeat_start), int(repeat_length), samples))
    return layers


class Edit(NamedTuple):
    """What has been put in force in the run."""

    begin: Tensor  # 0-dim int64, the count at which it begins, on its own clock
    piece: Schedule | FromRate
    rate: Tensor  # 0-dim float64, of that moment
    is_given: bool  # whether it is a schedule of the user's

    def schedule(self) -> Schedule:
        """Reads the device."""
        return self.piece.schedule(float(self.rate)) if isinstance(self.piece, FromRate) else self.piece


class ScheduleTable:
    """A schedule on a device, with the changes that its run has brought.

    Args:
        schedule: what the user asked for; it stays as it is.
        device: where `rows` lives.
    """

    rows: Tensor  # float64 (layers, rows, 9), the first layers of the memory: those that evaluators walk

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.schedule = schedule
        self.pieces: list[Edit] = []
        self._before: Tensor | None = None  # the first layer, when the first of these was made
        self.has_warned = False  # that nothing moves it
        layers = _layers(schedule)
        height = max(1 + CAPACITY, *map(_height, layers))
        # A plateau's layer is the last one there can be: graphs that have captured a report write to it.
        count = MAX_LAYERS if self.is_plateau or height <= _SMALL else len(layers)
        self._memory = torch.zeros(count, height, _COLUMNS, dtype=torch.float64, device=device)
        self._use(count if self.is_plateau else len(layers))
        self.restore({})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "rows": len(self.rows)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._use(state["rows"])

    def _use(self, count: int) -> None:
        self.rows = self._memory[:count]

    @property
    def is_plateau(self) -> bool:
        """Whether it is a `ReduceOnPlateau`."""
        return isinstance(self.schedule, ReduceOnPlateau)

    @property
    def of_schedule(self) -> Tensor:
        """The layers that edits change: all, or of a plateau those of the schedule inside."""
        return self.rows[:-1] if self.is_plateau else self.rows

    @property
    def given(self) -> Schedule:
        """The last schedule that the user gave, without a plateau."""
        replaced = [edit.piece for edit in self.pieces if isinstance(edit.piece, Schedule) and edit.is_given]
        return replaced[-1] if replaced else inner_of(self.schedule)

    def follow(self, other: ScheduleTable) -> None:
        """Become as another one of the same schedule, on whatever device."""
        device = self._memory.device
        self._memory.copy_(other._memory)
        self._use(len(other.rows))
        self.pieces = [each._replace(begin=each.begin.to(device), rate=each.rate.to(device)) for each in other.pieces]
        self._before = None if other._before is None else other._before.to(device)

    def report(self, metric: Tensor, rate: Tensor) -> None:
        """Let a plateau hear a metric.

        Args:
            metric: 0-dim float64 tensor on the table's device.
            rate: the same, what an evaluator makes of `of_schedule` at this moment.
        """
        assert isinstance(self.schedule, ReduceOnPlateau)
        reports.report(self.rows[-1], self.schedule, metric, rate)

    def reports(self) -> list[float] | None:
        """All that a plateau has heard, by `reports.NAMES`; None of another schedule. Reads the device."""
        return reports.state(self.rows[-1], self._base) if self.is_plateau else None

    def set_reports(self, values: Sequence[float]) -> None:
        """Let a plateau have heard that."""
        reports.set_state(self.rows[-1], values, self._base)

    @property
    def _base(self) -> float:
        """What a plateau's factor is without a reduction."""
        return self.schedule.base if isinstance(self.schedule, ReduceOnPlateau) and not self.pieces else 1.0

    # Edits of a WSD, which are fields of its schedule.

    def begin_decay(self, completed: Tensor, rate: Tensor) -> None:
        """Let the decay of a WSD begin now; one that has begun goes on.

        Args:
            completed: 0-dim int64 tensor on the table's device, the number of completed updates.
            rate: 0-dim float64 tensor, that of this moment: what an evaluator makes of `of_schedule`.
        """
        schedule = self._wsd("begin_decay")
        now = completed.to(torch.float64)
        begun = _decaying(self.rows, schedule, now, rate.clamp(min=schedule.min_lr))  # a warm-up may begin below
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
        if not isinstance(inner_of(self.schedule), WSD):
            return {}
        now = (self.rows[0] if self._before is None else self._before).cpu()
        edits: dict[str, Any] = {}
        if now[_STABLE, _PERIOD] > 1:
            edits["extended"] = int(now[_STABLE, _PERIOD]) - 1
        if now[_DONE, _PERIOD] > 1:
            edits |= {"decay_start": int(now[_DECAY, _START]), "decay_from": float(now[_DECAY, _HIGH])}
        return edits

    def _wsd(self, verb: str) -> WSD:
        inner = inner_of(self.schedule)
        if not isinstance(inner, WSD):
            raise TypeError(f"{verb} needs a WSD schedule, this one is {self.schedule!r}")
        if self.pieces:
            raise RuntimeError(
                f"{verb} is of a WSD as it was given, and this one was edited otherwise since, by "
                f"{shown(self.pieces[-1].piece)}; use begin_decay(), hold(), rewarm() or replace()"
            )
        return inner

    # Edits of any schedule: another piece from now on.

    def check_edit(self, piece: Schedule | FromRate) -> None:
        """Raise where there is no room for a piece."""
        layers = _layers(piece.schedule(1.0) if isinstance(piece, FromRate) else piece)
        needed, height = len(layers), max(map(_height, layers))
        most, room = len(self._memory) - self.is_plateau, self._memory.shape[1]
        if needed > most or height > room:
            raise ValueError(
                f"{shown(piece)} takes {needed} layers of {height - 1} rows (a row has 9 samples, if there are any), "
                f"and the memory of the schedule that it is to replace has room for {most} layers of {room - 1} "
                "rows, which stay since graphs may read them: assign it to the group's 'lr' to have other memory, "
                "and capture again"
            )

    def edit(self, piece: Schedule | FromRate, completed: Tensor, rate: Tensor) -> bool:
        """Put a piece in force from now on, on its own clock.

        Args:
            piece: a schedule, or what is made of one from the rate of this moment; `check_edit` allows it.
            completed: as in `begin_decay`.
            rate: as in `begin_decay`.

        Returns:
            Whether `rows` has more layers now: its address stays.
        """
        base = self._base
        if base != 1.0:
            self.rows[-1, 1, _HIGH].div_(base)
            rate = rate * base
        if not self.pieces:
            self._before = self.rows[0].clone()
        self.pieces.append(Edit(completed.clone(), piece, rate.clone(), isinstance(piece, Schedule)))
        layers = _layers(piece.schedule(1.0) if isinstance(piece, FromRate) else piece)
        widened = self._widen(len(layers))
        rows, later = (each.to(self.rows.device, non_blocking=True) for each in self._placed(layers))
        self.of_schedule.copy_(rows + later * completed)
        if isinstance(piece, FromRate):
            self.rows[0, 1, _HIGH].copy_(rate)
        return widened

    def standing(self) -> Schedule:
        """The schedule with all that was edited of it. Reads the device.

        Raises:
            ValueError: the pieces are of too many layers to be joined, or a decay began from a rate below its end.
        """
        inner = edited(inner_of(self.schedule), self.edits())
        if self.pieces:
            inner = join([inner, *(each.schedule() for each in self.pieces)], [int(e.begin) for e in self.pieces])
        return replace(self.schedule, schedule=inner) if isinstance(self.schedule, ReduceOnPlateau) else inner

    def saved_pieces(self) -> str | None:
        """What has been put in force, as JSON; None where nothing has. Reads the device."""
        saved = [[int(each.begin), each.schedule().to_dict(), each.is_given] for each in self.pieces]
        return json.dumps(saved) if saved else None

    def replace(self, schedule: Schedule) -> None:
        """Take another schedule, of as many segments, in the same memory."""
        self.schedule = schedule
        self.restore({})

    def restore(
        self,
        edits: dict[str, Any],
        pieces: Sequence[tuple[int, Schedule, bool]] = (),
        heard: Sequence[float] | None = None,
    ) -> None:
        """Bring the table to its schedule with these edits; none of them: as it was at first.

        Args:
            edits: of a WSD.
            pieces: what was put in force since: when, what, and whether it is the user's.
            heard: by a plateau.
        """
        layers = _layers(self.schedule)
        rows, _ = self._placed(layers[:-1] if self.is_plateau else layers)
        self.pieces, self._before = [], None
        if "extended" in edits:
            _extend(rows, edits["extended"])
        if "decay_start" in edits:
            start = rows.new_tensor(edits["decay_start"])
            rows = _decaying(rows, self._wsd("begin_decay"), start, edits["decay_from"])
        device = self.rows.device
        if pieces:
            self._before = rows[0].to(device)
            for begin, piece, is_given in pieces:
                rate = torch.tensor(piece(0), dtype=torch.float64, device=device)
                start = torch.tensor(begin, dtype=torch.int64, device=device)
                self.pieces.append(Edit(start, piece, rate, is_given))
            self._widen(len(piece.layers()))
            rows, later = self._placed(_layers(piece))
            rows += later * begin
        self.of_schedule.copy_(rows)
        if isinstance(self.schedule, ReduceOnPlateau):
            self.rows[-1].copy_(_placed(layers[-1:], 1, self.rows.shape[1])[0][0])
            self.set_reports(reports.beginning(self.schedule, self._base) if heard is None else heard)

    def _widen(self, layers: int) -> bool:
        if layers <= len(self.rows) - self.is_plateau:
            return False
        self._use(layers)
        return True

    def _placed(self, layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
        return _placed(layers, len(self.of_schedule), self.rows.shape[1])


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
