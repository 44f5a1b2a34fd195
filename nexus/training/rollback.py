"""What an optimizer and its schedulers are before a warm-up, to go back to."""

from __future__ import annotations

import gc
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import shown
from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, engine_of
from nexus.optim.step_memory import step_memory
from nexus.training.schedulers import ScheduleScheduler


def attached_schedulers(optimizer: Optimizer) -> list[LRScheduler]:
    """All schedulers of an optimizer, which does not know them."""
    found = [other for other in gc.get_objects() if issubclass(type(other), LRScheduler)]
    return [scheduler for scheduler in found if getattr(scheduler, "optimizer", None) is optimizer]


class HostState:
    """The Python side: what schedulers count, and the groups' options."""

    def __init__(self, optimizer: Optimizer, schedulers: list[LRScheduler]) -> None:
        self._groups = [(group, _options(group)) for group in optimizer.param_groups]
        self._schedulers: list[tuple[LRScheduler, dict[str, Any]]] = [
            (scheduler, {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()})
            for scheduler in schedulers
        ]
        self._counted = [(rates, rates.counted) for rates in map(_device_rates, schedulers) if rates is not None]

    def restore(self) -> None:
        """Go back."""
        for group, options in self._groups:
            for key in _options(group):
                if key not in options:
                    dict.pop(group, key)
            dict.update(group, options)  # a ParamGroup asks questions about each
        for scheduler, attributes in self._schedulers:
            vars(scheduler).update(attributes)
        for rates, counted in self._counted:
            rates.counted = counted

    def advances(self) -> dict[ScheduleScheduler[Any], int]:
        """How many steps the schedulers that compute their rates on the device have made since."""
        return {
            scheduler: steps
            for scheduler, attributes in self._schedulers
            if isinstance(scheduler, ScheduleScheduler) and (steps := scheduler.last_epoch - attributes["last_epoch"])
        }

    def refusal(self) -> str | None:
        """What has happened on the host since, that replays would not repeat."""
        for scheduler, attributes in self._schedulers:
            if _device_rates(scheduler) is None and scheduler.last_epoch != attributes["last_epoch"]:
                return (
                    f"the step calls {type(scheduler).__name__}.step(), which computes on the host: replays would "
                    "go on with the rate of the capture. Call it after the captured step, on an lr that is a tensor; "
                    "or give FusedAdamW a Schedule as lr, or use a scheduler of nexus.training.schedulers"
                )
        for index, (group, options) in enumerate(self._groups):
            for key, value in _options(group).items():
                before = options.get(key)
                if value is not before and not (isinstance(value, Tensor) or value == before):
                    return (
                        f"the step sets group {index}'s {key!r} from {shown(before)} to {shown(value)}, which "
                        "replays would not repeat. Set it outside of the step, or give FusedAdamW a Schedule"
                    )
        return None


class StateBefore:
    """The device's side, as far as torch does not see it written: what a `FusedAdamW` works on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._known = set(optimizer.state)
        self._values = {}
        if isinstance(optimizer, FusedAdamW):
            engine_of(optimizer).prepare(attributes_of(optimizer))
            self._values = {key: tensor.clone() for key, tensor in step_memory(optimizer).items()}

    def restore(self) -> None:
        """Go back, once; what is new is as if it had just been made."""
        if isinstance(self._optimizer, FusedAdamW):
            for key, tensor in step_memory(self._optimizer).items():
                if key in self._values:
                    tensor.copy_(self._values[key])
                else:
                    tensor.zero_()
            self._values.clear()

    def forget_new(self) -> None:
        """Let the optimizer have state for those parameters only which had some before."""
        for param in [param for param in self._optimizer.state if param not in self._known]:
            del self._optimizer.state[param]
        if isinstance(self._optimizer, FusedAdamW):
            engine_of(self._optimizer).forget_plan()


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _device_rates(scheduler: LRScheduler) -> Any:
    return scheduler._device_rates if isinstance(scheduler, ScheduleScheduler) else None
