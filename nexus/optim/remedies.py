"""What to do about a value that is no hyperparameter, and what is no parameter, for the ends of error messages."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import call_of, number_in
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
        if number_in(value) is not None:  # the check of a number has said what to write
            return ""
        if value.strip().lower() in ("none", "null", "auto", ""):
            return "; that is a string: leave it out, or write None where that is allowed"
        return (
            "; that is a string: write the Schedule, such as Cosine(peak_lr=1e-3, total_steps=1000), or "
            "from_transformers(name, lr, ...) for transformers' names"
        )
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


def warn_of_misspelt(group: Mapping[str, Any], settings: Collection[str], stacklevel: int) -> None:
    """Warn of what is nearly the name of a setting. A group may have keys of its user's, as in torch."""
    for key in group:
        meant = [] if key in settings else difflib.get_close_matches(str(key), settings, n=1, cutoff=0.85)
        if meant and meant[0] not in str(key):  # as in eps2 and no_weight_decay
            warnings.warn(
                f"a group has {key!r}, which no step reads; did you mean {meant[0]!r}?", stacklevel=stacklevel
            )
