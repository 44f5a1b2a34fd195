"""A parameter group: its hyperparameters, checked, and the schedules that drive them."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._subclasses import FakeTensor
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import as_real, check_number, shown
from nexus.backends.interface import LAST_WRITE, GroupSettings, Rate
from nexus.optim.averages import check_average
from nexus.optim.storage import STORAGE_DEFAULTS, check_choice
from nexus.schedules import Schedule

SCHEDULABLE = ("lr", "weight_decay")

OF_ALL = ("skip_nonfinite", "backend", "norm_group", "seed")
"""Options of the optimizer that no group can have for itself."""

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

    def schedules(self) -> list[tuple[str, Schedule]]:
        """The settings that a schedule drives, and their schedules."""
        shown = [(name, self[f"{name}_schedule"]) for name in SCHEDULABLE if self[f"{name}_schedule"] is not None]
        average = self.get("average")
        return shown if average is None or average.schedule is None else [*shown, ("average_decay", average.schedule)]

    def watched(self) -> tuple[Any, ...]:
        """The values of the settings, and of what else is looked at again when it is another object."""
        return tuple(map(super().get, WATCHED_NAMES))

    def is_settled(self) -> bool:
        """Whether every setting is the very object that it was at `mark_settled`."""
        return len(self._settled) > 0 and all(map(is_, self.watched(), self._settled))

    def mark_settled(self) -> None:
        """To be called when all settings are checked and in force. A tensor of the user's may change behind that."""
        rates = [(self[name], self.outputs.get(name)) for name in SCHEDULABLE]
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
            if output is not None and output is self.get(name) and output._version != self._versions[name]:
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
        if self["lr_scale"] != 1.0 and self["lr_schedule"] is None:
            raise ValueError(
                f"a group has lr_scale={self['lr_scale']!r}, which multiplies schedules, and the rate is "
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


def _rate(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64) or value.layout != torch.strided:
            raise ValueError(
                f"{name} as a tensor must have one element of float32 or float64, got the shape "
                f"{tuple(value.shape)} of {value.dtype}"
            )
        if value.device.type == "cpu" and not isinstance(value, FakeTensor):  # elsewhere, it would synchronise
            check_number(name, float(value.detach()))
        return value
    if isinstance(value, Schedule):
        return value
    if as_real(value) is None:
        raise TypeError(
            f"{name} must be a number >= 0, a one-element tensor or a Schedule, got {shown(value)}{_remedy(value)}"
        )
    return _number(name, value)


def _remedy(value: Any) -> str:
    if isinstance(value, LRScheduler):
        return "; from_torch(scheduler) makes a schedule for each group, and take_over puts them in force"
    if isinstance(value, list) and any(isinstance(each, Schedule) for each in value):
        return "; give each group its own: {'params': ..., 'lr': schedule}"
    if isinstance(value, type):
        return "; call it, with its arguments"
    return "; Schedule.from_function(fn, steps) makes a schedule of a function" if callable(value) else ""


def _schedule(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a Schedule or None, got {shown(value)}")
    return value


def _betas(name: str, value: Any) -> tuple[Any, Any]:
    try:
        first, second = [] if isinstance(value, (str, bytes, dict, set, frozenset)) else list(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a pair of numbers in [0, 1), got {shown(value)}") from None
    pair = _beta(f"{name}[0]", first), _beta(f"{name}[1]", second)
    return value if type(value) is tuple and all(map(is_, pair, value)) else pair


def _beta(name: str, value: Any) -> Any:
    # torch takes tensors of one element, and its schedulers of momenta leave them beside a float.
    beta = _number(name, float(value) if isinstance(value, Tensor) and value.numel() == 1 else value)
    if beta >= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {shown(value)}")
    return beta


def _number(name: str, value: Any) -> Any:
    number = check_number(name, value)
    return value if isinstance(value, (int, float)) else number


def _flag(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return value


def _limit(name: str, value: Any) -> Any:
    if value is None:
        return None
    if value == math.inf:
        return float(value)
    try:
        check_number(name, value, positive=True)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; None does not clip, math.inf measures the norm alone") from None
    return _number(name, value)


SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _rate,  # first: a backend takes over floats written here by itself
    "lr_schedule": _schedule,
    "weight_decay": _rate,
    "weight_decay_schedule": _schedule,
    "betas": _betas,
    "eps": _number,
    "lr_scale": _number,
    "amsgrad": _flag,
    "maximize": _flag,
    "max_grad_norm": _limit,
    "master_weight_bits": check_choice,
    "exp_avg_dtype": check_choice,
    "exp_avg_sq_dtype": check_choice,
    "stochastic_rounding": _flag,
    "average": check_average,
}
"""The keys of a group whose values a step uses. Each has a check, which returns what was given as a number of
Python's: in an array or a tensor, a change would go unnoticed."""

NEWER_SETTINGS: dict[str, Any] = {"lr_scale": 1.0, **STORAGE_DEFAULTS}
"""The settings that a group of torch's AdamW has not, with their defaults."""

STATE_OPTIONS = ("amsgrad", *STORAGE_DEFAULTS)
"""The settings on which it depends what the state of a parameter has."""

WATCHED_NAMES = (*SETTINGS, "differentiable", *OF_ALL)
"""The keys of a group that are looked at again when their value is another object."""


def checked_settings(group: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a group, as it is to be kept.

    Raises:
        TypeError, ValueError: naming the setting, what was given and what is allowed.
    """
    for name in OF_ALL:
        if name in group:
            raise TypeError(
                f"{name} is no option of a group, got {shown(group[name])}: it is the whole step's. Give it to "
                "FusedAdamW itself, and leave it out here"
            )
    _refuse_differentiable(group.get("differentiable"))
    return {name: check(name, group[name]) for name, check in SETTINGS.items()}


def listed_parameters(param_group: object) -> tuple[list[Any], list[Any]]:
    """Of a group that is to be added, the parameters as they are given, in a list; and without their names.

    Raises:
        TypeError, ValueError: it is none, or has a parameter twice.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, got {shown(param_group)}")
    if "params" not in param_group:
        raise ValueError(f"param_group must have the key 'params', got {sorted(map(str, param_group))}")
    params = param_group["params"]
    params = [params] if isinstance(params, Tensor) else params
    if isinstance(params, set) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a tensor or an ordered iterable of tensors, got {shown(params)}")
    params = list(params)
    tensors = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in params]
    first: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        if first.setdefault(id(tensor), index) != index:
            raise ValueError(
                f"a parameter is twice in this group, as number {first[id(tensor)]} and as number {index}, and "
                "would be updated twice in each step; give tied weights once, as parameters() of the model does"
            )
    return params, tensors


def check_torch_options(
    *, betas: object, capturable: object, differentiable: object, **implementations: object
) -> None:
    """Check what `torch.optim.AdamW` is told of how to run. Of these, only `differentiable` would change anything.

    Raises:
        TypeError: an option that is no bool.
        ValueError: one of the betas is a tensor. In a group, schedulers of momenta make such pairs.
        RuntimeError: two implementations at once; `differentiable=True`. As in torch.
    """
    if isinstance(betas, (tuple, list)) and len({isinstance(beta, Tensor) for beta in betas}) > 1:
        raise ValueError(f"betas must be either both floats or both Tensors, got {shown(betas)}")
    for name, value in implementations.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool or None, got {shown(value)}")
    if all(implementations.values()):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together; leave both out, FusedAdamW is fused")
    if not isinstance(capturable, bool):
        raise TypeError(f"capturable must be a bool, got {shown(capturable)}")
    if not isinstance(differentiable, bool):
        raise TypeError(f"differentiable must be a bool, got {shown(differentiable)}")
    _refuse_differentiable(differentiable)


def _refuse_differentiable(value: object) -> None:
    if value:
        raise RuntimeError(
            "`fused` does not support `differentiable`, and FusedAdamW is fused: use "
            "torch.optim.AdamW(differentiable=True) where gradients are to go through the update"
        )


def _tensor_rate(name: str, value: Tensor, device: torch.device, *, used: bool) -> Rate:
    """A rate that is a tensor; `used` if the group has parameters on this device."""
    if value.device == device:
        return Rate(tensor=value)
    if value.device.type == "cpu":
        return Rate(tensor=torch.zeros((), dtype=torch.float64, device=device), host=value)
    if used:
        raise ValueError(
            f"{name} is a tensor on {value.device}, and parameters of its group are on {device}: make it there, or "
            "on the CPU, or give a number or a Schedule. Parameters on several devices may have a group each"
        )
    return Rate(value=math.nan)


def settings_of(group: ParamGroup, tables: dict[str, Tensor], device: torch.device) -> GroupSettings:
    """A checked group as a backend wants it; `tables` are the segment tables of its schedules on `device`."""
    limit = group["max_grad_norm"]
    settings: GroupSettings = {}
    for name in SCHEDULABLE:
        value, output = group[name], group.outputs.get(name)
        if name in tables:
            scale = float(group["lr_scale"]) if name == "lr" else 1.0
            last = output if output is not None and output.device == device else None
            settings[name] = Rate(table=tables[name], scale=scale, last=last)
        elif isinstance(value, Tensor):
            settings[name] = _tensor_rate(name, value, device, used=any(p.device == device for p in group["params"]))
        else:
            settings[name] = Rate(value=float(value))
    settings["beta1"], settings["beta2"] = map(float, group["betas"])
    settings["eps"] = float(group["eps"])
    settings["max_grad_norm"] = math.inf if limit is None else float(limit)
    settings["maximize"] = group["maximize"]
    settings["average_decay"] = Rate(table=tables.get("average_decay"))
    if group["average"] is not None and group["average"].schedule is None:
        settings["average_decay"] = Rate(value=group["average"].decay)
    return settings
