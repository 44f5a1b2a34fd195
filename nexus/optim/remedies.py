"""What to do about a value that is no hyperparameter, and what is no parameter, for the ends of error messages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import call_of
from nexus.schedules import Schedule


def remedy(name: str, value: Any) -> str:
    """What to write in the place of something that was given as a number or a `Schedule`."""
    if isinstance(value, type):
        return f"; that is a class: write {call_of(value)}" if issubclass(value, Schedule) else "; that is a class"
    if isinstance(value, LRScheduler):
        return _of_scheduler(name, value)
    if type(value).__module__.startswith("timm."):
        return "; from_timm(scheduler) makes a Schedule for each group"
    if isinstance(value, str):
        return _of_text(value)
    if isinstance(value, Mapping):
        is_saved = "type" in value
        return "; Schedule.from_dict makes a Schedule of what to_dict() wrote" if is_saved else _for_each_group(name)
    if isinstance(value, list) and any(isinstance(each, Schedule) for each in value):
        return _for_each_group(name)
    return "; Schedule.from_function(fn, steps) makes a Schedule of a function of the step" if callable(value) else ""


def _for_each_group(name: str) -> str:
    return f"; give each group its own: {{'params': ..., {name!r}: ...}}"


def _of_scheduler(name: str, scheduler: LRScheduler) -> str:
    if isinstance(getattr(scheduler, "schedule", None), Schedule):  # one of nexus.training
        return "; give its Schedule: scheduler.schedule"
    if name != "lr":
        return "; from_torch(scheduler) makes a Schedule for each group"
    return (
        "; make the optimizer with a float, the scheduler over it, and call optimizer.take_over(scheduler). Of one "
        "over another optimizer, from_torch(scheduler) makes a Schedule for each group"
    )


def _of_text(text: str) -> str:
    try:
        return f"; that is a string (YAML reads 1e-3 as one, and 1.0e-3 as a number): write {float(text)!r}"
    except ValueError:
        return (
            "; that is a string: write the Schedule, such as Cosine(peak_lr=1e-3, total_steps=1000), or "
            "from_transformers(name, lr, ...) for transformers' names"
        )


def check_params(params: object) -> None:
    """Refuse what is nearly parameters: a module, its method, a state dict, a group.

    Raises:
        TypeError: saying what to give.
    """
    if isinstance(params, Mapping):
        remedy = "a list of groups: [{'params': ...}]" if "params" in params else "model.parameters()"
        raise TypeError(f"params must be parameters, got a {type(params).__name__}: give {remedy}")
    if inspect.ismethod(params):
        raise TypeError(f"params must be parameters, got the method {params.__name__}: call it, {params.__name__}()")
    for each in params if isinstance(params, (list, tuple)) else (params,):
        if isinstance(each, nn.Module) and not isinstance(each, nn.ParameterList):
            raise TypeError(
                f"params must be parameters, got the module {type(each).__name__}: give model.parameters(); or "
                "nexus.optim.param_groups(model), which leaves biases and norms without weight decay"
            )
