"""What an optimizer keeps on each device: counters, the tables of its schedules, and clocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from nexus.backends import reference
from nexus.backends.interface import StepState
from nexus.optim.clocks import Clocks
from nexus.optim.groups import ParamGroup
from nexus.schedules import Schedule
from nexus.schedules.clock import Clocked, unclocked
from nexus.schedules.table import ScheduleTable

Evaluate: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""A backend's `evaluate`, of a table and the count that it is evaluated at."""


class DeviceMemory:
    """Memory that is made once for each device, and follows when the parameters move.

    Args:
        skip_nonfinite: whether a step is skipped whose gradients are not finite.
        seed: of stochastic rounding.
    """

    def __init__(self, *, skip_nonfinite: bool, seed: int) -> None:
        self.skip_nonfinite = skip_nonfinite
        self.seed = seed
        self.states: dict[torch.device, StepState] = {}
        self.tables: dict[tuple[Schedule, torch.device], ScheduleTable] = {}
        self.clocks = Clocks()

    def state_on(self, device: torch.device) -> StepState:
        """The counters on a device."""
        if device not in self.states:
            state = StepState(device, self.skip_nonfinite, self.seed)
            for other in self.states.values():
                state.completed.copy_(other.completed)
                state.skipped.copy_(other.skipped)
                break
            self.states[device] = state
        return self.states[device]

    def table(self, schedule: Schedule, device: torch.device) -> ScheduleTable:
        """A schedule's table on a device."""
        if (schedule, device) not in self.tables:
            table = ScheduleTable(unclocked(schedule), device)
            for source in self.tables_of(schedule)[:1]:
                table.follow(source)
            self.tables[schedule, device] = table
        return self.tables[schedule, device]

    def clock_of(self, schedule: Schedule, device: torch.device) -> Tensor:
        """The count that a schedule is evaluated at: int64 on a device, its clock's or that of completed updates."""
        state = self.state_on(device)
        return self.clocks.on(schedule.clock, state).count if isinstance(schedule, Clocked) else state.completed

    def tables_of(self, schedule: Schedule) -> list[ScheduleTable]:
        """Of one schedule, those on each device."""
        return [self.tables[schedule, device] for device in self.states if (schedule, device) in self.tables]

    def keep(self, devices: list[torch.device]) -> None:
        """Let go of what was on other devices, which goes stale."""
        self.states = {device: self.state_on(device) for device in devices}
        self.tables = {key: table for key, table in self.tables.items() if key[1] in self.states}
        self.clocks.keep(devices)

    def coming(
        self, group: ParamGroup, name: str, device: torch.device, evaluate: Evaluate = reference.evaluate
    ) -> Any:
        """One of `RATES` of a settled group, as the coming update uses it: a number, or a tensor of one element."""
        schedule = group.schedule(name)
        if schedule is None:
            value = group.given(name)
            return value.detach().reshape(()) if isinstance(value, Tensor) else value
        now = evaluate(self.table(schedule, device).rows, self.clock_of(schedule, device))
        return now * self.coming(group, "lr_scale", device, evaluate) if name == "lr" else now
