"""Schedules of anything that is counted: tokens, samples, seconds."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Protocol

from nexus.arguments import shown
from nexus.schedules.base import Schedule, layers_of
from nexus.schedules.curves import Layer


class Counts(Protocol):
    """Where the counts of clocks are: an optimizer has them on its devices."""

    def read(self, clock: Clock) -> int:
        """The count of one."""


class Clock:
    """A count of anything, from 0, that schedules are evaluated at in place of the completed updates.

    `schedule.at(clock)` is a schedule at this clock, and `optimizer.advance(clock, n)` moves it. The count is the
    optimizer's, in device memory; each clock is itself alone, and no two are equal. An optimizer's copy has clocks of
    its own, as `optimizer.param_groups[0]["lr_schedule"].clock`.

    >>> import torch
    >>> from nexus.optim import FusedAdamW
    >>> from nexus.schedules import Clock, Linear
    >>> tokens = Clock()
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = FusedAdamW([weight], lr=Linear(start_lr=0.0, end_lr=1.0, total_steps=4096).at(tokens))
    >>> for count in (1024, 512):
    ...     weight.grad = torch.ones(2)
    ...     optimizer.step()
    ...     optimizer.advance(tokens, count)
    >>> tokens.count
    1536
    >>> weight.grad = torch.ones(2)
    >>> optimizer.step()
    >>> float(optimizer.param_groups[0]["lr"])
    0.375
    """

    _counts: weakref.ref[Counts] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # whoever has its count, says so of the copy
        return Clock, ()

    def __repr__(self) -> str:
        return "Clock()"

    @property
    def count(self) -> int:
        """What has been counted, as the last optimizer that took this clock has it; 0 without one. Synchronises."""
        counts = None if self._counts is None else self._counts()
        return 0 if counts is None else counts.read(self)

    def kept_by(self, counts: Counts) -> None:
        """Let `count` read there from now on, as long as that is."""
        self._counts = weakref.ref(counts)


@dataclass(frozen=True, repr=False)
class Clocked(Schedule):
    """A schedule at a clock: see `Schedule.at`."""

    schedule: Schedule
    clock: Clock = field(default_factory=Clock)
    _later = ("clock",)  # of an optimizer, not of a dict

    def __post_init__(self) -> None:
        if not isinstance(self.schedule, Schedule) or isinstance(self.schedule, Clocked):
            raise TypeError(f"schedule must be a nexus Schedule that is at no clock yet, got {shown(self.schedule)}")
        if not isinstance(self.clock, Clock):
            raise TypeError(f"clock must be a nexus.schedules.Clock, got {shown(self.clock)}; Clock() makes one")

    def __call__(self, step: int) -> float:
        return self.schedule(step)

    def phase(self, step: int) -> str:
        """The schedule's, at this count."""
        return self.schedule.phase(step)

    def layers(self) -> tuple[Layer, ...]:
        """The schedule's."""
        return layers_of(self.schedule)

    @property
    def length(self) -> int | None:
        """The count from which on the rate stays; None where it never does."""
        return self.schedule.length

    def to_dict(self) -> dict[str, Any]:
        """The schedule in plain types, without the clock: `from_dict` makes a new one."""
        return {"type": "Clocked", "schedule": self.schedule.to_dict()}

    def _scaled(self, factor: float) -> Clocked:
        return Clocked(factor * self.schedule, self.clock)

    def __repr__(self) -> str:
        return f"({self.schedule!r}).at({self.clock!r})"


def unclocked(schedule: Schedule) -> Schedule:
    """The schedule without its clock, if it is at one."""
    return schedule.schedule if isinstance(schedule, Clocked) else schedule
