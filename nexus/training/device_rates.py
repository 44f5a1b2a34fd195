"""The rates of the schedulers that drive a `FusedAdamW`, computed where its parameters are."""

from __future__ import annotations

from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from nexus.backends import reference
from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, devices_of
from nexus.schedules import Schedule
from nexus.schedules.table import ScheduleTable


class DeviceRates:
    """The rates of a FusedAdamW's groups, computed on the device from a counter of their own.

    Every group's `"lr"` becomes a 0-dim view of one float64 tensor, so that an advance is three operations
    however many groups there are. All schedulers of an optimizer write the same views: as with torch's, the one
    that has stepped last is in force.
    """

    _shared: ClassVar[WeakKeyDictionary[FusedAdamW, tuple[Tensor, tuple[Tensor, ...]]]] = WeakKeyDictionary()

    def __init__(self, optimizer: FusedAdamW, schedule: Schedule, last_epoch: int) -> None:
        device = devices_of(attributes_of(optimizer))[0]
        self.optimizer = optimizer
        self.table = ScheduleTable(schedule, device)
        self.counter = torch.full((), last_epoch, dtype=torch.int64, device=device)
        self.counted = last_epoch  # the counter, as the host has moved it
        self._find_views()

    def _find_views(self) -> None:
        optimizer, groups = self.optimizer, len(self.optimizer.param_groups)
        if optimizer not in self._shared or len(self._shared[optimizer][1]) != groups:
            rates = torch.zeros(groups, dtype=torch.float64, device=self.counter.device)
            self._shared[optimizer] = rates, rates.unbind()
        self.rates, self.views = self._shared[optimizer]
        self.scales = torch.ones_like(self.rates)
        self._seen_scales = [1.0] * groups

    def move_to(self, step: int) -> None:
        """Set the counter: by an addition where it is the next step, which a captured graph can repeat."""
        if step == self.counted + 1:
            self.counter.add_(1)
        else:
            self.counter.fill_(step)
        self.counted = step

    def go_on(self, schedule: Schedule, step: int) -> None:
        """Take another schedule, at a step of it."""
        self.table.replace(schedule)
        self.move_to(step)

    def begin_decay(self) -> None:
        """See `WSDScheduler.begin_decay`."""
        self.table.begin_decay(self.counter, reference.evaluate(self.table.rows, self.counter))

    def take_scales(self, scales: list[float]) -> None:
        """Let the next `show`, also one in a captured graph, multiply by these."""
        if scales != self._seen_scales:
            self.scales.copy_(torch.tensor(scales, dtype=torch.float64))
            self._seen_scales = scales

    def show(self, scales: list[float]) -> None:
        """Write every group's rate at the counter."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.views):  # one was added
            self._find_views()
        self.take_scales(scales)
        torch.mul(self.scales, self.optimizer.evaluator.evaluate(self.table.rows, self.counter), out=self.rates)
        for group, view in zip(groups, self.views, strict=True):
            if group["lr"] is not view:  # another number was put there
                group["lr"] = view
