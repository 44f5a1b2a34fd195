"""What of a train step happens on the host, where no replay repeats it: asked before a run of the step, and after."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import shown
from nexus.optim import FusedAdamW
from nexus.optim.parameters import named_parameters
from nexus.training.schedulers import ScheduleLR

_EAGER_BACKENDS = ("native", "torch", "reference")


def check_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Refuse an optimizer whose step a graph cannot hold.

    Raises:
        RuntimeError: with cause and remedy.
    """
    for _, param, name in named_parameters(optimizer.param_groups):
        if param.device != device:
            raise RuntimeError(
                f"{name} is on {param.device}, and others are on {device}: a train step is captured on one device. "
                "Move the model there as a whole, before the optimizer is made"
            )
    if isinstance(optimizer, FusedAdamW):
        if optimizer.backend in _EAGER_BACKENDS:
            raise RuntimeError(
                f"a FusedAdamW with backend={optimizer.backend!r} cannot be captured: it takes hyperparameters from "
                "the host at each step. Use backend='cuda' or 'triton'; 'auto' finds them"
            )
    elif not all(group.get("capturable", False) for group in optimizer.param_groups):
        raise RuntimeError(
            f"this {type(optimizer).__name__} cannot be captured: it counts its steps on the host, or may. Make it "
            "with capturable=True, if it has that, or use nexus.optim.FusedAdamW"
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        for index, group in enumerate(optimizer.param_groups):
            if not isinstance(group["lr"], Tensor):
                raise RuntimeError(
                    f"group {index} has the rate {shown(group['lr'])}, a number, and a scheduler of torch that sets "
                    "it: a graph would go on with the number that it was captured with. Give FusedAdamW a Schedule "
                    "as lr, or use a scheduler of nexus.training.schedulers, or make lr a tensor "
                    f"(torch.tensor({float(group['lr'])!r}, device={str(device)!r})) and call the scheduler's step() "
                    "outside of the captured step"
                )


class HostState:
    """What schedulers count, and the groups' options, as they are when this is made."""

    def __init__(self, optimizer: Optimizer) -> None:
        # An optimizer does not know its schedulers.
        found = [other for other in gc.get_objects() if issubclass(type(other), LRScheduler)]
        schedulers = [scheduler for scheduler in found if getattr(scheduler, "optimizer", None) is optimizer]
        self._groups = [(group, _options(group)) for group in optimizer.param_groups]
        self._schedulers: list[tuple[LRScheduler, dict[str, Any]]] = [
            (scheduler, {k: list(v) if isinstance(v, list) else v for k, v in vars(scheduler).items()})
            for scheduler in schedulers
        ]
        self._counted = [(rates, rates.counted) for rates in map(_device_rates, schedulers) if rates is not None]

    def rates(self) -> list[Tensor]:
        """Tensors of the optimizer and its schedulers that replays must find written by the device."""
        tensors = [value for _, options in self._groups for value in options.values() if isinstance(value, Tensor)]
        return tensors + [rates.counter for rates, _ in self._counted]

    def prepare_schedulers(self) -> None:
        """Let schedulers do now what they do before each replay, so that it becomes no part of the graph."""
        for scheduler, _ in self._schedulers:
            if isinstance(scheduler, ScheduleLR):
                scheduler.before_replay()

    def restore(self) -> None:
        """Go back: for a run whose work was captured, and not done."""
        for group, options in self._groups:
            for key in _options(group):
                if key not in options:
                    group.pop(key)
            group.update(options)
        for scheduler, attributes in self._schedulers:
            vars(scheduler).update(attributes)
        for rates, counted in self._counted:
            rates.counted = counted

    def advances(self) -> dict[ScheduleLR[Any], int]:
        """How many steps the schedulers that compute their rates on the device have made since."""
        return {
            scheduler: steps
            for scheduler, attributes in self._schedulers
            if isinstance(scheduler, ScheduleLR) and (steps := scheduler.last_epoch - attributes["last_epoch"])
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


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _device_rates(scheduler: LRScheduler) -> Any:
    return scheduler._device_rates if isinstance(scheduler, ScheduleLR) else None
