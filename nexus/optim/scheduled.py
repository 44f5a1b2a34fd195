"""What is done to the schedules of an optimizer while its run goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.lr_scheduler import ReduceLROnPlateau

from nexus.arguments import check_choice, check_count, check_number, shown
from nexus.optim.engine import Engine, attributes_of, devices_of
from nexus.optim.groups import ParamGroup
from nexus.optim.settings import checked_settings
from nexus.optim.timed import Timed
from nexus.schedules import WSD, ReduceOnPlateau, Schedule, betas_from_torch, from_torch
from nexus.schedules.clock import Clocked
from nexus.schedules.compose import checked_part
from nexus.schedules.curves import DECAYS
from nexus.schedules.imports.plateaus import heard_by
from nexus.schedules.imports.torch_schedulers import step_of
from nexus.schedules.pieces import FromRate, decay_of, highest
from nexus.schedules.table import ScheduleTable


class Scheduled(Timed):
    """The part of an optimizer that edits its schedules, on the device."""

    _engine: Engine
    param_groups: list[Any]  # of ParamGroup

    @_disable_dynamo
    def take_over(self, scheduler: Any, *, steps: int | None = None, exact: bool = False) -> list[Schedule]:
        """Compute the rates of one of torch's schedulers on the device from here on: each group gets its schedule.

        So do the first betas that `OneCycleLR` and `CyclicLR` cycle.

        The count of updates becomes the scheduler's, which is not to be stepped any more; a schedule of the weight
        decay goes on at that count, too. A `ReduceLROnPlateau` counts no updates: the count stays, and `report()`
        goes on from the best metric, the bad ones and the cooldown of the scheduler.

        Args:
            scheduler: of `torch.optim.lr_scheduler`, over this optimizer, new or in mid-run, stepped once an update.
            steps: as of `nexus.schedules.from_torch`.
            exact: as of `nexus.schedules.from_torch`.

        Returns:
            The schedule of each group.

        Raises:
            ValueError: the scheduler is over another optimizer, or its schedules are in force already.
            NotImportable, ImportMismatch: as of `nexus.schedules.from_torch`. In each case nothing is changed.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FusedAdamW([weight], lr=1.0)
        >>> optimizer.take_over(torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5))
        [Exponential(peak_lr=1.0, gamma=0.5, every=1, min_lr=0.0)]
        >>> for _ in range(3):
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        >>> float(optimizer.param_groups[0]["lr"])
        0.25
        """
        if getattr(scheduler, "optimizer", None) is not self:
            raise ValueError(
                f"scheduler must be one of torch's over this optimizer, got {shown(scheduler)}; of one over another "
                "optimizer, from_torch(scheduler) makes a Schedule for each group"
            )
        completed = step_of(scheduler)
        if any(_is_taken_over(group, scheduler) for group in self.param_groups):
            raise ValueError(
                f"take_over has put the schedules of this {type(scheduler).__name__} in force already, and would set "
                f"the count of updates back to {completed}, where the scheduler stands; leave out the second call"
            )
        schedules = from_torch(scheduler, steps=steps, exact=exact)
        betas = betas_from_torch(scheduler, steps=steps, exact=exact)
        for group, pair in zip(self.param_groups, betas, strict=True):
            checked_settings({**group, "betas": pair})
        pairs = zip(self.param_groups, betas, strict=True)
        self._engine.check_kept({**group, "betas": pair} for group, pair in pairs)
        for group, schedule, pair in zip(self.param_groups, schedules, betas, strict=True):
            group["lr"] = schedule
            group["betas"] = pair
            group.taken_over = schedule, weakref.ref(scheduler)
        is_plateau = isinstance(scheduler, ReduceLROnPlateau)  # whose count is that of its reports
        for device in [] if is_plateau else devices_of(attributes_of(self)):
            self._engine.state_on(device).completed.fill_(completed)
        # Now, not at the next step: a scheduler that is stepped on would make another schedule of one.
        self._engine.settle(attributes_of(self))
        for schedule in schedules if is_plateau else []:
            for table in self._engine.tables_of(schedule):
                table.set_reports(heard_by(scheduler, cast(ReduceOnPlateau, schedule)))
        return schedules

    @property
    @_disable_dynamo
    def schedules(self) -> list[Schedule | None]:
        """The schedule of each group's rate with all that was edited of it; None of a group that has none.

        Reads the device. Of a `ReduceOnPlateau`, the reductions are not in it.
        """
        standing: dict[Schedule, Schedule] = {}
        for schedule, table, _ in self._tables_of_rates():
            whole = table.standing()
            standing[schedule] = whole.at(schedule.clock) if isinstance(schedule, Clocked) else whole
        return [standing.get(group["lr_schedule"]) for group in self.param_groups]

    @property
    def schedule(self) -> Schedule:
        """The schedule that the rates of all groups share, with all that was edited of it. Reads the device.

        Raises:
            RuntimeError: they share none.
        """
        schedules = self.schedules
        if schedules[0] is None or any(each != schedules[0] for each in schedules):
            raise RuntimeError(f"the groups share no schedule: see optimizer.schedules, one a group: {schedules!r}")
        return schedules[0]

    @_disable_dynamo
    def next_lr(self) -> list[float]:
        """The rate that the coming update will use, one a group, whatever drives it. For logs: reads the device.

        With a `Schedule`, `param_groups[i]["lr"]` is the rate that the last update has used.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> from nexus.schedules import Linear
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FusedAdamW([weight], lr=Linear(start_lr=1.0, end_lr=0.0, total_steps=4))
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> float(optimizer.param_groups[0]["lr"]), optimizer.next_lr(), optimizer.completed_steps
        (1.0, [0.75], 1)
        """
        _refuse_capture(devices_of(attributes_of(self))[0])  # type: ignore[arg-type]
        return self._engine.next_lr(attributes_of(self))  # type: ignore[arg-type]  # this is a part of one

    @property
    @_disable_dynamo
    def completed_steps(self) -> int:
        """How many updates have been completed: skipped ones do not count. Reads the device."""
        device = devices_of(attributes_of(self))[0]  # type: ignore[arg-type]
        _refuse_capture(device)
        return int(self._engine.state_on(device).completed)

    @_disable_dynamo
    @torch.no_grad()
    def begin_decay(self, steps: int | None = None, *, kind: str = "linear", to: float = 0.0) -> None:
        """Let the rate decay from now on, from what it is at this moment. Reads nothing back from the device.

        Without `steps`, the decay of every WSD schedule of this optimizer begins with the next step, also of a weight
        decay; one that has begun goes on. With `steps`, every schedule that is a group's `lr` is left for a decay of
        so many updates, also one that decays already.

        Call this, as all edits, between steps, not in a step that is captured; graphs that have captured a step see
        it. What the schedules have become, `schedules` tells.

        Args:
            steps: updates, at least 1.
            kind: `"linear"`, `"cosine"` or `"sqrt"`.
            to: the rate after the decay, which stays.

        Raises:
            RuntimeError: no group has a WSD schedule, or with `steps` a schedule.
            TypeError, ValueError: naming the argument; nothing is changed.
        """
        if steps is not None:
            curve = DECAYS[check_choice("kind", kind, DECAYS)].name.lower()
            piece = FromRate(curve, check_number("to", to), check_count("steps", steps, low=1))
            self._edit(lambda table: piece)
            return
        if kind != "linear" or to != 0.0:
            raise ValueError("kind and to are of a decay with steps: give steps, or leave them to the WSD schedule")
        late: list[tuple[ScheduleTable, Tensor, Schedule | FromRate]] = []
        for table, now in self._wsd_tables():
            if not table.pieces:
                table.begin_decay(now, self._rate(table, now))
                continue
            decay = decay_of(cast(WSD, table.given))
            last = table.pieces[-1].piece
            if last != decay and not (isinstance(last, Schedule) and decay.has_made(last)):
                late.append((table, now, decay))
        self._put(late)

    @_disable_dynamo
    @torch.no_grad()
    def extend_stable(self, n: int) -> None:
        """Make the stable phase of every WSD schedule of this optimizer `n` updates longer.

        A decay that has begun goes on. Reads nothing back from the device.

        Raises:
            RuntimeError: no group has a WSD schedule, or one was edited otherwise.
            TypeError, ValueError: `n` is no count, or a stable phase is open-ended.
        """
        tables = self._wsd_tables()
        for table, _ in tables:
            table.check_extend_stable(n)
        for table, now in tables:
            table.extend_stable(n, now)

    @_disable_dynamo
    def hold(self) -> None:
        """Keep the rate of this moment from now on, in every group whose `lr` is a schedule. See `begin_decay`.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> from nexus.schedules import Linear
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FusedAdamW([weight], lr=Linear(start_lr=1.0, end_lr=0.0, total_steps=4))
        >>> rates = []
        >>> for step in range(4):
        ...     if step == 2:
        ...         optimizer.hold()
        ...     weight.grad = torch.ones(2)
        ...     optimizer.step()
        ...     rates.append(float(optimizer.param_groups[0]["lr"]))
        >>> rates
        [1.0, 0.75, 0.5, 0.5]
        """
        self._edit(lambda table: FromRate())

    @_disable_dynamo
    def rewarm(self, steps: int, *, to: float | None = None) -> None:
        """Let the rate rise on a straight line from what it is at this moment, and stay. See `begin_decay`.

        Args:
            steps: updates of the rise, at least 1.
            to: the rate after it; by default the highest of the schedule that was given last.

        Raises:
            ValueError: `to` is left out, and that schedule grows without end. Nothing is changed.
        """
        steps = check_count("steps", steps, low=1)
        high = None if to is None else check_number("to", to)
        self._edit(lambda table: FromRate("linear", highest(table.given) if high is None else high, steps))

    @_disable_dynamo
    def replace(self, schedule: Schedule) -> None:
        """Put another schedule in force from now on, at its own step 0, for every schedule that is a group's `lr`.

        See `begin_decay`. A `ReduceOnPlateau` keeps what it has heard and its reductions: the schedule inside of it
        is replaced.

        Raises:
            RuntimeError: no group has a schedule.
            TypeError: `schedule` is none, or a `ReduceOnPlateau`.
            ValueError: it does not fit in the memory of a schedule, which stays since graphs may read it. There is
                room for 16 rows, or as many as the first schedule needed, in four layers, or three of a plateau.
        """
        checked = checked_part("schedule", schedule)
        self._edit(lambda table: checked)

    @torch.no_grad()
    def _edit(self, piece_of: Callable[[ScheduleTable], Schedule | FromRate]) -> None:
        """Put a piece in force in every table of a rate."""
        tables = self._tables_of_rates()
        if not tables:
            raise RuntimeError("no parameter group has a schedule as lr: there is none to edit; write group['lr']")
        self._check_apart({schedule for schedule, _, _ in tables})
        self._put([(table, now, piece_of(table)) for _, table, now in tables])

    def _check_apart(self, rates: set[Schedule]) -> None:
        """Refuse to edit a schedule that drives more than rates: equal ones share their memory."""
        for index, group in enumerate(self.param_groups):
            for name, schedule in group.schedules():
                if name != "lr" and schedule in rates:
                    raise RuntimeError(
                        f"group {index} has {shown(schedule)} as {name}, too, which an edit of the rate would "
                        f"change: give {name} a schedule that differs in some argument"
                    )

    def _put(self, edits: list[tuple[ScheduleTable, Tensor, Schedule | FromRate]]) -> None:
        for table, _, piece in edits:
            table.check_edit(piece)
        for table, now, piece in edits:
            if table.edit(piece, now, self._rate(table, now)):
                self._engine.renew_tables()

    def _rate(self, table: ScheduleTable, now: Tensor) -> Tensor:
        """The rate of this moment, without a plateau's factor."""
        return self._engine.backend.evaluate(table.of_schedule, now)

    def _tables_of_rates(self) -> list[tuple[Schedule, ScheduleTable, Tensor]]:
        """Of each schedule that is a group's rate, on each device; and its count."""
        tables = self._tables()
        rates = {group["lr_schedule"] for group in self.param_groups}
        return [each for each in tables if each[0] in rates]

    def _wsd_tables(self) -> list[tuple[ScheduleTable, Tensor]]:
        tables = self._tables()
        chosen = [(table, now) for _, table, now in tables if isinstance(table.given, WSD)]
        for _, table, _ in tables:
            given = table.given
            if not isinstance(given, WSD) and any(isinstance(part, WSD) for part in given.parts()):
                raise RuntimeError(
                    f"a WSD that is part of another schedule cannot be edited: {given!r}; begin_decay(steps) lets "
                    "any rate decay"
                )
        if not chosen:
            raise RuntimeError(
                "no parameter group has a WSD schedule; give one as lr, or ask the WSDScheduler; or say how long the "
                "decay is, begin_decay(steps)"
            )
        return chosen

    def _tables(self) -> list[tuple[Schedule, ScheduleTable, Tensor]]:
        """Of every schedule, on each device; and the count that it is evaluated at."""
        engine = self._engine
        engine.settle(attributes_of(self))  # type: ignore[arg-type]  # this is a part of one
        found = []
        for (schedule, device), table in engine.tables.items():
            _refuse_capture(device)
            found.append((schedule, table, engine.clock_of(schedule, device)))
        return found


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a step is being captured, and its graph would do this anew in each replay: call this between steps, and "
            "the graph follows"
        )


def _is_taken_over(group: ParamGroup, scheduler: object) -> bool:
    """Whether the rate of the group is driven by a schedule that `take_over` has made of the scheduler."""
    schedule, taken = group.taken_over or (None, None)
    return taken is not None and taken() is scheduler and group["lr_schedule"] is schedule
