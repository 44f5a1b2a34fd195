"""A parameter group, and the schedules that drive its settings."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext

from nexus.arguments import shown
from nexus.backends.interface import LAST_WRITE, RATES, GroupSettings, Rate
from nexus.optim.settings import BETAS, SCHEDULABLE, WATCHED_NAMES
from nexus.schedules import Schedule

OWN_SCHEDULE = (
    "evaluates its own schedule, {!r}: it advances with step() and takes no scheduler. Leave the scheduler out, or "
    "give FusedAdamW a float lr to use one; where a trainer wants a scheduler, give it "
    "nexus.training.schedulers.FollowingScheduler(optimizer), which reports the rate and leaves it alone."
)
"""What a scheduler is told that would overwrite a schedule."""


class ParamGroup(dict[str, Any]):
    """A group as `torch.optim` has them, a dict, that says when it is written to, and refuses a rate's second driver.

    `group["lr_schedule"]` is the `Schedule` given as `lr`, or None; `group["lr"]` is then a 0-dim float64 tensor
    that holds the rate last used. The same goes for `weight_decay`.
    """

    outputs: dict[str, Tensor]  # the tensors that schedules write, by setting
    driver: str | None  # the class of the nexus scheduler that writes "lr"
    taken_over: tuple[Schedule, weakref.ref[Any]] | None  # the schedule, and the scheduler of torch's that it was

    def __init__(self, group: dict[str, Any]) -> None:
        super().__init__(group)
        self.outputs = {}
        self._versions: dict[str, int] = {}  # of the outputs: kernels do not count, and whoever else writes does
        self._settled: tuple[Any, ...] = ()
        self.driver = self.taken_over = None

    def __reduce__(self) -> tuple[Any, ...]:  # not item by item, which would ask _refuse_scheduler
        return _restored, (dict(self), self.outputs, self.driver)

    def get(self, key: str, default: Any = None) -> Any:
        # Dynamo asks this when it finds `param_groups` in the code that it traces, and then crashes: it takes groups
        # to be of the very type dict. So that code runs outside of the graph.
        if key == "params" and TracingContext.try_get() is not None and not torch.compiler.is_dynamo_compiling():
            raise torch._dynamo.exc.Unsupported("param_groups of a FusedAdamW are read outside of the graph")
        return super().get(key, default)

    def setdefault(self, key: str, default: Any = None) -> Any:
        self._refuse_scheduler(key)
        value = super().setdefault(key, default)
        LAST_WRITE[0] = object()
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        self._refuse_scheduler(key)
        super().__setitem__(key, value)
        LAST_WRITE[0] = object()

    def given(self, name: str) -> Any:
        """One of `RATES`, as it stands in the group."""
        if name == "average_decay":
            average = self.get("average")
            return 0.0 if average is None else average.decay
        return self["betas"][BETAS.index(name)] if name in BETAS else self[name]

    def schedule(self, name: str) -> Schedule | None:
        """What drives one of `RATES`, if it is a schedule."""
        value = self[f"{name}_schedule"] if name in SCHEDULABLE else self.given(name)
        return value if isinstance(value, Schedule) else None

    def schedules(self) -> list[tuple[str, Schedule]]:
        """Those of `RATES` that a schedule drives, and their schedules."""
        found = [(name, self.schedule(name)) for name in RATES]
        return [(name, schedule) for name, schedule in found if schedule is not None]

    def replaced(self) -> list[Schedule]:
        """The schedules in the place of which another one, or the same anew, was assigned since the last step."""
        assigned = [name for name in SCHEDULABLE if isinstance(self[name], Schedule)]
        return [self[f"{name}_schedule"] for name in assigned if self[f"{name}_schedule"] is not None]

    def watched(self) -> tuple[Any, ...]:
        """The values of the settings, and of what else is looked at again when it is another object."""
        return tuple(map(super().get, WATCHED_NAMES))

    def is_settled(self) -> bool:
        """Whether every setting is the very object that it was at `mark_settled`."""
        return len(self._settled) > 0 and all(map(is_, self.watched(), self._settled))

    def mark_settled(self) -> None:
        """To be called when all settings are checked and in force. A tensor of the user's may change behind that."""
        rates = [(self.given(name), self.outputs.get(name)) for name in RATES]
        if not any(isinstance(rate, Tensor) and rate is not output for rate, output in rates):
            self._settled = self.watched()

    def show(self, name: str, value: Tensor | float) -> None:
        """Let the reader of a scheduled setting see a value, until the next step writes its own."""
        shown = self.outputs[name].data  # so that it does not count as the user's
        shown.copy_(value) if isinstance(value, Tensor) else shown.fill_(value)

    def check_outputs(self) -> None:
        """Refuse what was written in place over a scheduled setting.

        Raises:
            RuntimeError: the next step would write over it. With the remedy.
        """
        for name, schedule in self.schedules():
            output = self.outputs.get(name)
            if output is not None and output is self.given(name) and output._version != self._versions[name]:
                raise RuntimeError(
                    f"group[{name!r}] was written in place (as by ReduceLROnPlateau, or `*=`) while {schedule!r} "
                    f"drives it, and the next step writes over it.{self._origin(schedule)} To let something else "
                    "drive it, give FusedAdamW a float; to go on without the schedule, set "
                    f"group['{name}_schedule'] = None"
                )

    def _origin(self, schedule: Schedule) -> str:
        scheduler = self.taken_over[1]() if self.taken_over and self.taken_over[0] is schedule else None
        if scheduler is None:
            return ""
        return f" take_over made this schedule of the {type(scheduler).__name__}: leave out the step() of that one."

    def check_scale(self) -> None:
        """Refuse an `lr_scale` that would be ignored: no schedule drives the rate, here or in a nexus scheduler.

        Raises:
            ValueError: with the remedy.
        """
        scale = self["lr_scale"]
        if self["lr_schedule"] is None and (isinstance(scale, (Tensor, Schedule)) or scale != 1.0):
            raise ValueError(
                f"a group has lr_scale={scale!r}, which multiplies schedules, and the rate is "
                f"{shown(self['lr'])}. Give FusedAdamW a Schedule as lr, or use a scheduler of "
                "nexus.training.schedulers, in the place of what multiplies the rate by lr_scale (a loop, or timm's "
                "schedulers); or write the product as the group's lr, and delete its lr_scale"
            )

    def settle(self, name: str, device: torch.device) -> Schedule | None:
        """Sort out who drives setting `name`. Returns its schedule if that has just been assigned.

        Raises:
            RuntimeError: the setting has a schedule, and something else was assigned to it.
        """
        value, output = self[name], self.outputs.get(name)
        if isinstance(value, Schedule):
            self[f"{name}_schedule"] = value
        schedule: Schedule | None = self[f"{name}_schedule"]
        if schedule is None:
            self.outputs.pop(name, None)  # a tensor that is left there is a plain tensor now
            return None
        if output is not None and value is not output and not isinstance(value, Schedule):
            raise RuntimeError(
                f"group[{name!r}] was set to {shown(value)} while {schedule!r} drives it.{self._origin(schedule)} To "
                f"hold a fixed value, set group['{name}_schedule'] = None as well; to change the schedule, assign "
                "another Schedule."
            )
        if output is not None and output.device == device and value is output:
            return None
        if output is None or output.device != device:
            self.outputs[name] = torch.zeros((), dtype=torch.float64, device=device)
        self._versions[name] = self.outputs[name]._version
        self[name] = self.outputs[name]
        return schedule

    def _refuse_scheduler(self, key: str) -> None:
        # Every scheduler of torch.optim.lr_scheduler begins by writing this key.
        if key != "initial_lr":
            return
        if isinstance(self.get("lr_schedule"), Schedule):
            # One that has written to the rate before it comes here has changed nothing, either.
            self._versions = {name: output._version for name, output in self.outputs.items()}
            raise RuntimeError(f"this optimizer {OWN_SCHEDULE.format(self['lr_schedule'])}")
        if self.driver is not None:
            raise RuntimeError(
                f"a {self.driver} drives this optimizer's rate on the device, and would overwrite what another "
                "scheduler writes. Attach one of the two alone."
            )


def _noted(name: str) -> Callable[..., Any]:
    write = getattr(dict, name)

    @functools.wraps(write)
    def noted(self: ParamGroup, *args: Any, **kwargs: Any) -> Any:
        result = write(self, *args, **kwargs)
        LAST_WRITE[0] = object()
        return result

    return noted


for _name in ("__delitem__", "__ior__", "clear", "pop", "popitem", "update"):  # the other ways to write to a dict
    setattr(ParamGroup, _name, _noted(_name))


def _restored(items: dict[str, Any], outputs: dict[str, Tensor], driver: str | None) -> ParamGroup:
    group = ParamGroup(items)
    group.outputs, group.driver = outputs, driver
    group._versions = {name: output._version for name, output in outputs.items()}
    return group


def shown_name(rate: str) -> str:
    """What a user calls one of `RATES`."""
    return f"betas[{BETAS.index(rate)}]" if rate in BETAS else rate


def _tensor_rate(name: str, value: Tensor, device: torch.device, *, used: bool) -> Rate:
    """A rate that is a tensor; `used` if the group has parameters on this device."""
    if value.device == device:
        return Rate(tensor=value)
    if value.device.type == "cpu":
        return Rate(tensor=torch.zeros((), dtype=torch.float64, device=device), host=value)
    if used:
        raise ValueError(
            f"{shown_name(name)} is a tensor on {value.device}, and parameters of its group are on {device}: make "
            "it there, or on the CPU, or give a number or a Schedule. Parameters on several devices may have a "
            "group each"
        )
    return Rate(value=math.nan)


def settings_of(group: ParamGroup, tables: dict[str, Tensor], device: torch.device) -> GroupSettings:
    """A checked group as a backend wants it; `tables` are the segment tables of its schedules on `device`."""
    settings: GroupSettings = {"maximize": group["maximize"]}
    for name in RATES:
        value, output = group.given(name), group.outputs.get(name)
        if name in tables:
            last = output if output is not None and output.device == device else None
            settings[name] = Rate(table=tables[name], last=last)
        elif isinstance(value, Tensor):
            settings[name] = _tensor_rate(name, value, device, used=any(p.device == device for p in group["params"]))
        else:
            settings[name] = Rate(value=math.inf if value is None else float(value))
    return settings
