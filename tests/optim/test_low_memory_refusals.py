"""Options, state dicts and state by hand that low-memory state refuses, each with a remedy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from low_memory_runs import BF16, SEVEN_BYTES, assert_same, beside, go_on, parameters, trained
from torch import Tensor

from nexus.optim import FusedAdamW

CHOICES = "None, torch.float32, torch.bfloat16 or torch."
BAD_OPTIONS: list[tuple[torch.dtype, dict[str, Any], type[Exception], str]] = [
    (BF16, {"exp_avg_dtype": torch.uint8}, ValueError, f"exp_avg_dtype must be {CHOICES}int8, got torch.uint8"),
    (BF16, {"exp_avg_sq_dtype": torch.float16}, ValueError, f"exp_avg_sq_dtype must be {CHOICES}uint8, got"),
    (BF16, {"exp_avg_dtype": "int8"}, TypeError, f"exp_avg_dtype must be {CHOICES}int8, got 'int8'"),
    (BF16, {"master_weight_bits": 16}, ValueError, "master_weight_bits must be None, 24 or 32, got 16"),
    (BF16, {"master_weight_bits": True}, TypeError, "master_weight_bits must be None, 24 or 32, got True "),
    (BF16, {"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be a bool, got 1 "),
    (BF16, {"seed": 1.5}, TypeError, "seed must be an int from 0"),
    (BF16, {"seed": -1}, ValueError, "seed must be an int from 0"),
    (torch.float32, {"master_weight_bits": 24}, ValueError, "is of float32, and a master weight of 24 bits has less"),
    (torch.float16, {"master_weight_bits": 32}, ValueError, "is of float16, which is no upper half of a float32"),
    (torch.float16, {"stochastic_rounding": True}, ValueError, "is of float16, which is not rounded by chance"),
    (
        torch.float64,
        {"exp_avg_dtype": torch.float32},
        ValueError,
        "is of float64, for which there is no exp_avg_dtype",
    ),
    (torch.float64, {"stochastic_rounding": True}, ValueError, "is of float64, for which there is no stochastic"),
]


@pytest.mark.parametrize(
    ("dtype", "options", "error", "words"), BAD_OPTIONS, ids=[str(case[1:2]) for case in BAD_OPTIONS]
)
def test_options_that_cannot_be_had(dtype: torch.dtype, options: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        FusedAdamW(parameters(dtype), **options)
    if "seed" not in options:
        with pytest.raises(error, match=words):
            FusedAdamW([{"params": parameters(dtype), **options}])
    optimizer, params = trained(dtype)
    before = copy.deepcopy(optimizer.state_dict())
    for name, value in options.items():
        if name != "seed":
            with pytest.raises(error, match=words):
                optimizer.add_param_group({"params": parameters(dtype), name: value})
            optimizer.param_groups[0][name] = value
            with pytest.raises(error, match=words):
                go_on(optimizer, params, 1)
            optimizer.param_groups[0][name] = optimizer.defaults[name]
    assert_same(optimizer.state_dict()["state"], before["state"])


class Codes(torch.Tensor):
    """Stands for the subclasses in which torchao keeps moments."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Codes:
        wrapper: Codes = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        wrapper.inner = inner
        return wrapper

    inner: Tensor

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Codes:
        return Codes(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError


def change(**entries: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def write(state: dict[str, Any]) -> None:
        for name, make in entries.items():
            state[name.replace("__", "::")] = make(state["exp_avg"])

    return write


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "FlashOptim": (change(exp_avg__quantized=Tensor.char, exp_avg__scales=Tensor.half), "is FlashOptim's, with"),
    "FlashOptim's masters": (change(error_bits=Tensor.char), "is FlashOptim's, with 'error_bits'"),
    "torchao": (change(exp_avg=Codes), "has exp_avg as a Codes, whose codes FusedAdamW does not read"),
    "codes without scales": (change(exp_avg=Tensor.char), "exp_avg is of torch.int8, and needs 35 scales of float32"),
    "other codes": (change(exp_avg_sq=Tensor.char), "exp_avg_sq must be dense, of floating point"),
    "codes on meta": (change(exp_avg=lambda moment: moment.char().to("meta")), "exp_avg must be dense, of floating"),
    "negative scales": (
        change(exp_avg_sq=Tensor.byte, exp_avg_sq_scale=lambda moment: torch.full((35,), -1.0)),
        "exp_avg_sq_scale is negative somewhere",
    ),
    "a sparse master": (
        change(master_param=lambda moment: moment.float().to_sparse()),
        "master_param must be of shape",
    ),
    "another master": (
        change(master_param=lambda moment: moment[:3].float()),
        r"master_param must be of shape \(67, 65\)",
    ),
    "a narrow master": (change(master_param=lambda moment: moment.half()), "master_param must be of shape"),
}


BY_HAND: dict[str, tuple[str, Callable[[], Tensor], str]] = {
    "expanded scales": (
        "exp_avg_scale",
        lambda: torch.zeros(1).expand(35),
        "needs 35 scales of float32 beside it, contiguous on",
    ),
    "scales on meta": ("exp_avg_scale", lambda: torch.zeros(35, device="meta"), "needs 35 scales of float32 beside"),
    "sparse scales": ("exp_avg_sq_scale", lambda: torch.zeros(35).to_sparse(), "needs 35 scales of float32 beside"),
    "other codes": (
        "exp_avg",
        lambda: torch.zeros(67, 65, dtype=torch.uint8),
        "may be of torch.int8 or float32, got torch.uint8, which are other codes",
    ),
    "low bits on meta": (
        "master_low",
        lambda: torch.zeros(67, 65, dtype=torch.uint8, device="meta"),
        "'master_low' must be of shape .* delete it to go on from the parameter as it is",
    ),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("name", "make", "words"), BY_HAND.values(), ids=BY_HAND.keys())
def test_state_by_hand_that_a_kernel_cannot_read(
    name: str, make: Callable[[], Tensor], words: str, backend: str
) -> None:
    optimizer, params = trained(backend=backend, **SEVEN_BYTES)
    right, before = optimizer.state[params[0]][name], copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.state[params[0]][name] = make()
    with pytest.raises(ValueError, match=words):
        go_on(optimizer, params, 1)
    optimizer.state[params[0]][name] = right
    assert_same(optimizer.state_dict()["state"], before)


def test_what_is_offloaded_is_not_read() -> None:
    optimizer, params = trained(**SEVEN_BYTES)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = [torch.zeros(param.shape) for param in params]
    params[0].grad = None
    for tensor in (params[0], optimizer.state[params[0]]["exp_avg_scale"]):
        kept = tensor.untyped_storage().clone()
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"cannot be decoded.* Bring back what was offloaded"):
            optimizer.state_dict()
        if tensor is params[0]:
            with pytest.raises(ValueError, match="has a master weight, and its parameter no memory: bring it back"):
                optimizer.load_state_dict(saved)
            with pytest.raises(ValueError, match="must be dense, and both must have memory"):
                optimizer.load_master(weights)
        tensor.untyped_storage().resize_(kept.nbytes())
        tensor.untyped_storage().copy_(kept)
    assert_same(optimizer.state_dict()["state"], saved["state"])


@pytest.mark.parametrize(("write", "words"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_state_dicts_that_are_refused(write: Callable[[dict[str, Any]], None], words: str) -> None:
    optimizer, params = trained(**SEVEN_BYTES)
    saved = copy.deepcopy(optimizer.state_dict())
    write(saved["state"][0])
    other, _ = beside(params, **SEVEN_BYTES)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(saved)
    assert not other.state_dict()["state"]


def test_codes_of_the_first_format_are_refused() -> None:
    optimizer, params = trained(**SEVEN_BYTES)
    other, _ = beside(params, **SEVEN_BYTES)
    with pytest.raises(ValueError, match=r"state\[0\] .* as an earlier nexus stored them: load it there"):
        other.load_state_dict(optimizer.state_dict(compact=True) | {"nexus_format": 1})
    assert not other.state_dict()["state"]
    other.load_state_dict(optimizer.state_dict() | {"nexus_format": 1})
    assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])
