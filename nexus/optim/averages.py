"""Averages of a parameter's values over its updates: what a group may ask for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from nexus.arguments import as_real, check_count, shown
from nexus.schedules import Schedule
from nexus.schedules.bounds import bounds_of
from nexus.schedules.curves import NEVER, Curve, Segment, level, segment

DTYPES = (torch.float32, torch.bfloat16)


class Average:
    """What a group asks for: an `EMA` or a `Mean`."""

    decay: float | Schedule
    dtype: torch.dtype

    @property
    def is_narrow(self) -> bool:
        """Whether averages are stored as bfloat16, where a parameter has as many elements as to make it worth it."""
        return self.dtype == torch.bfloat16

    @property
    def schedule(self) -> Schedule | None:
        """The schedule of the decay, if it has one."""
        return self.decay if isinstance(self.decay, Schedule) else None


@dataclass(frozen=True)
class EMA(Average):
    r"""An exponential moving average of the parameters, updated by the kernel that updates the parameters.

    With :math:`\beta` the decay and :math:`\theta_t` the parameter after its update,
    :math:`a_t = a_{t-1} + (1 - \beta) (\theta_t - a_{t-1})`. A parameter's first update copies it, as
    `torch.optim.swa_utils.AveragedModel` does.

    Args:
        decay: from 0 to less than 1; or a `Schedule` of values from 0 to 1, at the optimizer's count of updates.
        dtype: `torch.float32`, 4 bytes a parameter; or `torch.bfloat16`, 2 bytes, always rounded by chance, since to
            nearest it would soon stand still. float64 parameters have float64 averages, and never bfloat16 ones;
            tensors of fewer than 4,096 elements have float32 ones.

    Raises:
        TypeError, ValueError: a decay out of range, or another dtype.

    >>> EMA(decay=0.999)
    EMA(decay=0.999, dtype=torch.float32)
    """

    decay: float | Schedule = 0.999
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "decay", _checked_decay(self.decay))
        _check_dtype(self.dtype)


@dataclass(frozen=True)
class Mean(Average):
    r"""The mean of the parameters after update `start` and all later ones, as stochastic weight averaging takes it.

    Izmailov et al. 2018, arXiv:1803.05407. Until update `start`, the average is the parameter itself.

    Args:
        start: the first update (from 0) whose result counts.
        dtype: as of `EMA`. The longer the mean, the less a value counts: prefer float32.

    Raises:
        TypeError, ValueError: `start` is no count, or another dtype.

    >>> Mean(start=1000)
    Mean(start=1000, dtype=torch.float32)
    """

    start: int = 0
    dtype: torch.dtype = torch.float32
    decay: Schedule = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", check_count("start", self.start))
        object.__setattr__(self, "decay", MeanDecay(self.start))
        _check_dtype(self.dtype)


KINDS: dict[str, Any] = {"EMA": EMA, "Mean": Mean}


@dataclass(frozen=True)
class MeanDecay(Schedule):
    r"""The decay with which a moving average is the mean from `start` on.

    It is 0 until then, and later :math:`1 - 1 / (1 + t - \text{start})`.

    >>> MeanDecay(start=2).values(0, 6)
    [0.0, 0.0, 0.0, 0.5, 0.6666666666666667, 0.75]
    """

    start: int

    def phase(self, step: int) -> str:
        return "mean" if check_count("step", step) >= self.start else "copy"

    def segments(self) -> tuple[Segment, ...]:
        mean = segment(Curve.INVERSE, self.start, NEVER, 0.0, 1.0, span=1.0)
        return (mean,) if self.start == 0 else (level(0, 0.0), mean)


def check_average(name: str, value: Any) -> Average | None:
    """Check the option `average` of a group; what `saved_average` has made of one is one again.

    Raises:
        TypeError, ValueError: with what is allowed.
    """
    if isinstance(value, Mapping):
        return _from_dict(name, value)
    if value is not None and not isinstance(value, Average):
        remedy = f"; write EMA({value!r})" if as_real(value) is not None else ""
        remedy = "; call it" if value in (EMA, Mean) else remedy
        raise TypeError(f"{name} must be an EMA, a Mean or None, got {shown(value)}{remedy}")
    return value


def saved_average(average: Average | None) -> dict[str, Any] | None:
    """An average in plain types."""
    if average is None:
        return None
    saved = {"type": type(average).__name__, "dtype": str(average.dtype)}
    if isinstance(average, Mean):
        return saved | {"start": average.start}
    return saved | {"decay": average.decay.to_dict() if isinstance(average.decay, Schedule) else average.decay}


def warn_of_difference(now: Average | None, saved: dict[str, Any], states: list[Any], index: int) -> None:
    """Say where averages that were saved are not gone on with, or in another way. To be called by `load_state_dict`.

    Args:
        now: what group `index` asks for.
        saved: the saved group.
        states: those of its parameters.
        index: of the group.

    Raises:
        TypeError, ValueError: `saved` has an average that is none.
    """
    before = check_average(f"average of param_groups[{index}] of the loaded state dict", saved.get("average"))
    if now is not None and before is not None and saved_average(now) != saved_average(before):
        warnings.warn(
            f"group {index} averages its parameters by {now}, and the checkpoint did by {before}: what was saved "
            "goes on by the former",
            stacklevel=4,
        )
    if now is None and any(isinstance(state, dict) and "average" in state for state in states):
        warnings.warn(
            f"the checkpoint has averages of the parameters of group {index}, which keeps none here: they are left "
            f"out. Give the constructor average={before or 'EMA(...)'} to go on with them",
            stacklevel=4,
        )


def _from_dict(name: str, value: Mapping[str, Any]) -> Average:
    values = dict(value)
    kind, dtype = KINDS.get(str(values.pop("type", None))), str(values.pop("dtype", None)).removeprefix("torch.")
    if kind is None or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"{name} must be an EMA, a Mean or None, got {shown(value)}")
    if isinstance(values.get("decay"), Mapping):
        values["decay"] = Schedule.from_dict({key: each for key, each in values["decay"].items() if key != "step"})
    average: Average = kind(**values, dtype=getattr(torch, dtype))
    return average


def _checked_decay(decay: Any) -> float | Schedule:
    if isinstance(decay, Schedule):
        for value, step in bounds_of(decay):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"decay must be a Schedule of values from 0 to 1, got {value} at step {step}")
        return decay
    number = as_real(decay)
    if number is None:
        raise TypeError(f"decay must be a number from 0 to less than 1 or a Schedule, got {shown(decay)}")
    if not 0.0 <= number < 1.0:
        raise ValueError(f"decay must be a number from 0 to less than 1 or a Schedule, got {shown(decay)}")
    return float(number) + 0.0


def _check_dtype(dtype: Any) -> None:
    if dtype not in DTYPES:
        kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
        raise kind(f"dtype of an average must be torch.float32 or torch.bfloat16, got {shown(dtype)}")
