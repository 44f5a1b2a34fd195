"""What is done to the schedules of an optimizer while its run goes on."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch._compile import _disable_dynamo

from nexus.arguments import shown
from nexus.backends import reference
from nexus.optim.engine import Engine, attributes_of, devices_of
from nexus.optim.groups import ParamGroup
from nexus.optim.timed import Timed
from nexus.schedules import WSD, Schedule, from_torch
from nexus.schedules.imports.torch_schedulers import step_of
from nexus.schedules.table import ScheduleTable


class Scheduled(Timed):
    """The part of an optimizer that edits its schedules, on the device."""

    _engine: Engine
    param_groups: list[Any]  # of ParamGroup

    @_disable_dynamo
    def take_over(self, scheduler: Any, *, steps: int | None = None, exact: bool = False) -> list[Schedule]:
        """Compute the rates of one of torch's schedulers on the device from here on: each group gets its schedule.

        The count of updates becomes the scheduler's, which is not to be stepped any more; a schedule of the weight
        decay goes on at that count, too.

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
            raise ValueError(f"scheduler must be one of torch's over this optimizer, got {shown(scheduler)}")
        completed = step_of(scheduler)
        if any(_is_taken_over(group, scheduler) for group in self.param_groups):
            raise ValueError(
                f"take_over has put the schedules of this {type(scheduler).__name__} in force already, and would set "
                f"the count of updates back to {completed}, where the scheduler stands; leave out the second call"
            )
        schedules = from_torch(scheduler, steps=steps, exact=exact)
        for group, schedule in zip(self.param_groups, schedules, strict=True):
            group["lr"] = schedule
            group.taken_over = schedule, weakref.ref(scheduler)
        for device in devices_of(attributes_of(self)):
            self._engine.state_on(device).completed.fill_(completed)
        # Now, not at the next step: a scheduler that is stepped on would make another schedule of one.
        self._engine.settle(attributes_of(self))
        return schedules

    @_disable_dynamo
    def begin_decay(self) -> None:
        """Let the decay of every WSD schedule of this optimizer begin with the next step.

        It starts from the rate of this moment, whatever that is: from 0, it stays 0. A decay that has begun goes
        on. Reads nothing back from the device.

        Raises:
            RuntimeError: no group has a WSD schedule.
        """
        for table, now in self._wsd_tables():
            table.begin_decay(now, reference.evaluate(table.rows, now))

    @_disable_dynamo
    def extend_stable(self, n: int) -> None:
        """Make the stable phase of every WSD schedule of this optimizer `n` updates longer.

        A decay that has begun goes on. Reads nothing back from the device.

        Raises:
            RuntimeError: no group has a WSD schedule.
            TypeError, ValueError: `n` is no count, or a stable phase is open-ended.
        """
        tables = self._wsd_tables()
        for table, _ in tables:
            table.check_extend_stable(n)
        for table, now in tables:
            table.extend_stable(n, now)

    def _wsd_tables(self) -> list[tuple[ScheduleTable, Tensor]]:
        self._engine.settle(attributes_of(self))  # type: ignore[arg-type]  # this is a part of one
        chosen = [
            (table, self._engine.clock_of(schedule, device))
            for (schedule, device), table in self._engine.tables.items()
            if isinstance(table.schedule, WSD)
        ]
        for schedule in (table.schedule for table in self._engine.tables.values()):
            if not isinstance(schedule, WSD) and any(isinstance(part, WSD) for part in schedule.parts()):
                raise RuntimeError(f"a WSD that is part of another schedule cannot be edited: {schedule!r}")
        if not chosen:
            raise RuntimeError("no parameter group has a WSD schedule; give one as lr, or ask the WSDScheduler")
        return chosen


def _is_taken_over(group: ParamGroup, scheduler: object) -> bool:
    """Whether the rate of the group is driven by a schedule that `take_over` has made of the scheduler."""
    schedule, taken = group.taken_over or (None, None)
    return taken is not None and taken() is scheduler and group["lr_schedule"] is schedule
