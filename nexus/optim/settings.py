"""The settings of a parameter group: what each may be, and what is said of anything else."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from nexus.arguments import as_real, check_number, in_a_string, shown
from nexus.arguments import check_choice as argument_choice
from nexus.optim.averages import Average, check_average
from nexus.optim.remedies import remedy
from nexus.optim.storage import BIAS_CORRECTIONS, STORAGE_DEFAULTS, check_choice
from nexus.optim.torch_options import refuse_differentiable
from nexus.schedules import Schedule
from nexus.schedules.bounds import bounds_of

SCHEDULABLE = ("lr", "weight_decay")
"""The settings that show, in the place of their schedule, the rate last used. The other ones of `RATES` keep it."""

BETAS = ("beta1", "beta2")
"""What `RATES` calls the two of `betas`."""

OF_ALL = ("skip_nonfinite", "backend", "norm_group", "seed")
"""Options of the optimizer that no group can have for itself."""


def _rate(name: str, value: Any, *, below: float = math.inf, positive: bool = False) -> Any:
    """Check one of `RATES`; a tensor or a schedule has to be `below` a bound, too, and above 0 if `positive`."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64) or value.layout != torch.strided:
            raise ValueError(
                f"{name} as a tensor must have one element of float32 or float64, got the shape "
                f"{tuple(value.shape)} of {value.dtype}"
            )
        if value.device.type == "cpu" and not isinstance(value, FakeTensor):  # elsewhere, it would synchronise
            number = float(value.detach())
            if not (positive and number == math.inf):
                check_number(name, number, positive=positive)
            if number >= below and below < math.inf:
                raise ValueError(f"{name} must be a number in [0, {below:g}), got {shown(number)}")
        return value
    if isinstance(value, Schedule):
        return _bounded(name, value, below, positive)
    if as_real(value) is None:
        given = f"{shown(value)}{in_a_string(value)}{remedy(name, value)}"
        raise TypeError(f"{name} must be a number >= 0, a one-element tensor or a Schedule, got {given}")
    return _number(name, value)


def _bounded(name: str, schedule: Schedule, below: float, positive: bool) -> Schedule:
    if below == math.inf and not positive:
        return schedule
    (lowest, at_lowest), (highest, at_highest) = bounds_of(schedule)
    for value, step, fits in (
        (highest, at_highest, highest < below),
        (lowest, at_lowest, lowest > 0.0 or not positive),
    ):
        if not fits:
            allowed = "above 0" if positive else f"in [0, {below:g})"
            raise ValueError(
                f"{name} must stay {allowed}, and {schedule!r} is {value!r} at step {step}; end it short of that, or "
                "bound it by schedule.clip(low, high)"
            )
    return schedule


def _schedule(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a Schedule or None, got {shown(value)}")
    return value


def _betas(name: str, value: Any) -> tuple[Any, Any]:
    try:
        first, second = [] if isinstance(value, (str, bytes, dict, set, frozenset)) else list(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a pair, each a number in [0, 1), a one-element tensor or a Schedule, got {shown(value)}"
        ) from None
    pair = _beta(f"{name}[0]", first), _beta(f"{name}[1]", second)
    return value if type(value) is tuple and all(map(is_, pair, value)) else pair


def _beta(name: str, value: Any) -> Any:
    # torch's schedulers of momenta leave tensors beside a float.
    if isinstance(value, (Tensor, Schedule)):
        return _rate(name, value, below=1.0)
    beta = _number(name, value)
    if beta >= 1.0:
        raise ValueError(f"{name} must be a number in [0, 1), got {shown(value)}")
    return beta


def _small(name: str, value: Any) -> Any:
    return _rate(name, value) if isinstance(value, (Tensor, Schedule)) else _number(name, value)


def _number(name: str, value: Any) -> Any:
    try:
        number = check_number(name, value)
    except TypeError as error:
        raise TypeError(f"{error}{remedy(name, value)}") from None
    return value if isinstance(value, (int, float)) else number


def _form(name: str, value: Any) -> Any:
    return argument_choice(name, value, BIAS_CORRECTIONS)


def _flag(name: str, value: Any) -> Any:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {shown(value)}")
    return value


def _limit(name: str, value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, (Tensor, Schedule)):
        try:
            return _rate(name, value, positive=True)
        except ValueError as error:
            raise ValueError(f"{error}; the number 0, or None, does not clip") from None
    if value == math.inf:
        return float(value)
    try:
        return _number(name, value) or None
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; None or 0 does not clip, math.inf measures the norm alone") from None


def is_limited(group: dict[str, Any]) -> bool:
    """Whether a group has a limit of the norm; 0 is none, also where no step has looked at it yet."""
    limit = group["max_grad_norm"]
    return limit is not None and (isinstance(limit, Tensor) or limit != 0.0)


SETTINGS: dict[str, Callable[[str, Any], Any]] = {
    "lr": _rate,  # first: a backend takes over floats written here by itself
    "lr_schedule": _schedule,
    "weight_decay": _rate,
    "weight_decay_schedule": _schedule,
    "betas": _betas,
    "eps": _small,
    "lr_scale": _small,
    "bias_correction": _form,
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

NEWER_SETTINGS: dict[str, Any] = {"lr_scale": 1.0, "bias_correction": "product", **STORAGE_DEFAULTS}
"""The settings that a group of torch's AdamW has not, with their defaults."""

STATE_OPTIONS = ("amsgrad", *STORAGE_DEFAULTS)
"""The settings on which it depends what the state of a parameter has, beside `keeps_products`."""


def in_state(value: Any) -> Any:
    """What of one of `STATE_OPTIONS` the state depends on: of an average, how it is stored."""
    return value.dtype if isinstance(value, Average) else value


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
    refuse_differentiable(group.get("differentiable"))
    return {name: check(name, group[name]) for name, check in SETTINGS.items()}
