"""The clocks of an optimizer: counts in device memory that its schedules are evaluated at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus.arguments import MAX_STEP
from nexus.backends.interface import StepState
from nexus.schedules.clock import Clock


class DeviceClock:
    """The count of one clock on one device.

    Args:
        state: the counters of the optimizer there.
    """

    @torch.inference_mode(False)  # it outlives a mode in which it may be made
    def __init__(self, state: StepState) -> None:
        self.count = torch.zeros((), dtype=torch.int64, device=state.device)  # never replaced: graphs read it
        self._completed = torch.zeros_like(self.count)  # the counters at the last step that was not skipped, as far
        self._skipped = torch.zeros_like(self.count)  # as advance() has looked
        self.start_at(0, state)

    def start_at(self, count: int, state: StepState) -> None:
        """Go on from a count, as if no step had been skipped."""
        self.count.fill_(count)
        self._completed.copy_(state.completed)
        self._skipped.copy_(state.skipped)

    def copy_(self, other: DeviceClock) -> None:
        """Take over the count of the same clock on another device."""
        self.count.copy_(other.count)
        self._completed.copy_(other._completed)
        self._skipped.copy_(other._skipped)

    def advance(self, n: Tensor | int, state: StepState) -> None:
        """Add `n`, unless every step since the last that counted was skipped. Enqueues work."""
        moves = (state.completed != self._completed) | (state.skipped == self._skipped)
        self.count.add_(moves * n).clamp_(max=MAX_STEP)
        self._completed.copy_(state.completed)
        self._skipped.copy_(torch.where(moves, state.skipped, self._skipped))


class Clocks:
    """All clocks that an optimizer has met. They stay, since graphs may read them."""

    def __init__(self) -> None:
        self.kept: dict[Clock, dict[torch.device, DeviceClock]] = {}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.__dict__.update(attributes)
        for clock in self.kept:
            clock.kept_by(self)

    def __contains__(self, clock: object) -> bool:
        return clock in self.kept

    def on(self, clock: Clock, state: StepState) -> DeviceClock:
        """A clock on the device of these counters."""
        devices = self.kept.get(clock)
        if devices is None:
            devices = self.kept[clock] = {}
            clock.kept_by(self)
        if state.device not in devices:
            made = DeviceClock(state)
            for other in devices.values():
                made.copy_(other)
                break
            devices[state.device] = made
        return devices[state.device]

    def keep(self, devices: list[torch.device]) -> None:
        """Forget what is on other devices, where it goes stale."""
        for clock, found in self.kept.items():
            self.kept[clock] = {device: own for device, own in found.items() if device in devices} or found

    def every(self) -> list[DeviceClock]:
        """All of them, on each device."""
        return [found for devices in self.kept.values() for found in devices.values()]

    def read(self, clock: Clock) -> int:
        """The count of a clock. Waits for the device."""
        return next((int(found.count) for found in self.kept[clock].values()), 0)
