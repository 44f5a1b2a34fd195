"""How the state of a parameter is stored: what its group asks for, as far as the parameter can have it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus.arguments import shown
from nexus.backends.codecs import LOW_DTYPES, SCALE_BLOCK, SCALED
from nexus.optim.parameters import is_trained, named_parameters
from nexus.schedules import Schedule

STORAGE_DEFAULTS: dict[str, Any] = {
    "master_weight_bits": None,
    "exp_avg_dtype": None,
    "exp_avg_sq_dtype": None,
    "stochastic_rounding": False,
    "average": None,
}
"""The options of a group that say how state is stored, and what each is where nothing is asked for."""

BIAS_CORRECTIONS = ("product", "power")
"""How the bias of the moments is corrected where a beta moves; where none does, both are the same number."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "master_weight_bits": (None, *LOW_DTYPES),
    "exp_avg_dtype": (None, torch.float32, torch.bfloat16, torch.int8),
    "exp_avg_sq_dtype": (None, torch.float32, torch.bfloat16, torch.uint8),
}

SMALL = 4096
"""A tensor of fewer elements, the whole of it, keeps float32 moments: fewer bits would save next to nothing."""


class Storage(NamedTuple):
    """The dtype of each stream of a parameter's state; None for what it has not."""

    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    amsgrad: bool
    master_low: torch.dtype | None = None
    stochastic_rounding: bool = False
    average: torch.dtype | None = None
    products: bool = False  # whether the products of the betas are kept

    def moments(self) -> dict[str, torch.dtype]:
        """By their names in the state."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return moments | {"max_exp_avg_sq": self.exp_avg_sq} if self.amsgrad else moments

    def streams(self) -> dict[str, torch.dtype]:
        """By their names in the state, with the low bits of a master weight and an average."""
        others = {"master_low": self.master_low, "average": self.average}
        return self.moments() | {name: dtype for name, dtype in others.items() if dtype is not None}


def moment_dtype(param: Tensor) -> torch.dtype:
    """Of the arithmetic, and of moments as they are by default: float64 for a float64 parameter, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def check_choice(name: str, value: Any) -> Any:
    """Check one of the options of `CHOICES`.

    Raises:
        TypeError, ValueError: naming the option, what was given and what is allowed.
    """
    allowed = CHOICES[name]
    if isinstance(value, str):  # of a state dict, whose groups some wrappers write back
        value = next((each for each in allowed if isinstance(each, torch.dtype) and str(each) == value), value)
    if not isinstance(value, (bool, Tensor)) and hasattr(value, "__index__"):
        value = int(value)  # of any library
    if not any(type(value) is type(each) and value == each for each in allowed):
        listed = f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}"
        kind = ValueError if isinstance(value, torch.dtype) or type(value) is int else TypeError
        raise kind(f"{name} must be {listed}, got {shown(value)}")
    return value


def check_seed(seed: Any) -> None:
    """Check the seed of an optimizer's chance.

    Raises:
        TypeError, ValueError: with what is allowed.
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int from 0 to 2**63 - 1, got {shown(seed)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be an int from 0 to 2**63 - 1, got {shown(seed)}")


def storage_of(param: Tensor, group: dict[str, Any], where: str) -> Storage:
    """How the state of a parameter is to be stored. `where` names the parameter in an error.

    Raises:
        ValueError: the parameter cannot have what its group asks for. With the remedy.
    """
    asked = {name: group.get(name, default) for name, default in STORAGE_DEFAULTS.items()}
    amsgrad = group["amsgrad"]
    products = keeps_products(group)
    if asked == STORAGE_DEFAULTS:
        return Storage(moment_dtype(param), moment_dtype(param), amsgrad, products=products)
    bits = asked["master_weight_bits"]
    remedy = "give such parameters a group of their own, without it"
    for name, value in asked.items():
        narrow = value != STORAGE_DEFAULTS[name] and (name != "average" or value.is_narrow)
        if param.dtype == torch.float64 and narrow:
            raise ValueError(f"{where} is of float64, for which there is no {name}={value}: {remedy}")
    if bits is not None and param.dtype == torch.float16:
        raise ValueError(
            f"{where} is of float16, which is no upper half of a float32 master weight: master_weight_bits={bits} is "
            f"for bfloat16. Train in bfloat16, or {remedy}"
        )
    if bits == 24 and param.dtype == torch.float32:
        raise ValueError(
            f"{where} is of float32, and a master weight of 24 bits has less: master_weight_bits=24 is for bfloat16; "
            f"{remedy}"
        )
    if asked["stochastic_rounding"] and param.dtype == torch.float16:
        raise ValueError(f"{where} is of float16, which is not rounded by chance: use bfloat16, or {remedy}")
    wide, average = moment_dtype(param), asked["average"]
    chosen = dict.fromkeys(asked) if param.numel() < SMALL else asked
    return Storage(
        exp_avg=chosen["exp_avg_dtype"] or wide,
        exp_avg_sq=chosen["exp_avg_sq_dtype"] or wide,
        amsgrad=amsgrad,
        master_low=LOW_DTYPES[bits] if bits is not None and param.dtype == torch.bfloat16 else None,
        stochastic_rounding=asked["stochastic_rounding"],
        average=None if average is None else torch.bfloat16 if chosen["average"] and average.is_narrow else wide,
        products=products,
    )


def keeps_products(group: Mapping[str, Any]) -> bool:
    """Whether state keeps the products of a group's betas, since one of them may move."""
    moves = any(isinstance(beta, (Tensor, Schedule)) for beta in group.get("betas", ()))
    return moves and group["bias_correction"] == "product"


def bytes_of(param: Tensor, storage: Storage, *, gradient: torch.dtype | None) -> float:
    """Bytes that each element of a parameter takes: its own, those of its state, and of a gradient if it has one."""
    single = (param.dtype, gradient, storage.master_low, storage.average)
    return sum(dtype.itemsize for dtype in single if dtype is not None) + sum(
        dtype.itemsize + (4 / SCALE_BLOCK if dtype in SCALED else 0) for dtype in storage.moments().values()
    )


def trained_storages(groups: Sequence[dict[str, Any]], first: int = 0) -> list[tuple[Tensor, Storage]]:
    """The trained parameters of some groups, of which `first` is the index of the first; raises as `storage_of`."""
    named = [each for each in named_parameters(groups, first) if is_trained(each[1])]
    return [(param, storage_of(param, groups[index - first], name)) for index, param, name in named]


def average_bytes(groups: Sequence[dict[str, Any]]) -> float:
    """Those of an element of the trained parameters of some groups, with gradients in the parameters' dtypes."""
    total, count = 0.0, 0
    for param, storage in trained_storages(groups):
        gradient = param.dtype if param.grad is None else param.grad.dtype
        total += param.numel() * bytes_of(param, storage, gradient=gradient)
        count += param.numel()
    return total / max(count, 1)


MODES: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("float32", torch.float32, {}),
    (
        "float32, bfloat16 moments",
        torch.float32,
        {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16},
    ),
    ("float32, 8-bit moments", torch.float32, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}),
    ("bfloat16", torch.bfloat16, {}),
    ("bfloat16 + 32-bit master", torch.bfloat16, {"master_weight_bits": 32}),
    (
        "bfloat16 + 32-bit master, bfloat16 moments",
        torch.bfloat16,
        {"master_weight_bits": 32, "exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16},
    ),
    (
        "bfloat16 + 24-bit master, 8-bit moments",
        torch.bfloat16,
        {"master_weight_bits": 24, "exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8},
    ),
    (
        "bfloat16 by chance, 8-bit moments",
        torch.bfloat16,
        {"stochastic_rounding": True, "exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8},
    ),
)
"""The ways of storing that people want: a name, the parameters' dtype, and the options of a group."""


def bytes_table() -> Iterable[tuple[str, float, float]]:
    """(mode, bytes a parameter with its gradient, bytes that an update moves) of each of `MODES`."""
    for name, dtype, options in MODES:
        param = torch.empty(SMALL, dtype=dtype, device="meta")
        storage = storage_of(param, {"amsgrad": False} | options, name)
        resident = bytes_of(param, storage, gradient=dtype)
        yield name, resident, 2 * resident - dtype.itemsize
