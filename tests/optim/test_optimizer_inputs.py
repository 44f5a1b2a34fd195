"""Bad arguments: each is named, with what was given and what is allowed; nothing is half made."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from references import make_grads, make_params, same_bits, set_grads, snapshot

from nexus import backends
from nexus.optim import FusedAdamW
from nexus.schedules import Constant

RATES = ("lr", "weight_decay")
RATE = "must be a finite number >= 0, got"
RATE_TYPE = "must be a number >= 0, a one-element tensor or a Schedule, got"
RATE_TENSOR = "as a tensor must have one element of float32 or float64, got the shape"
NUMBER = "must be a finite number >= 0, got"
BOOL = "must be a bool, got"
LIMIT = "must be a finite number > 0, got .*None does not clip, math.inf measures the norm alone"

BAD: list[tuple[str, Any, type[Exception], str]] = [
    *((name, value, ValueError, f"{name} {RATE}") for name in RATES for value in (-1e-9, math.nan, math.inf)),
    *((name, value, TypeError, f"{name} {RATE_TYPE}") for name in RATES for value in ("0.1", None, True, 1j, [0.1])),
    ("lr", torch.ones(2), ValueError, rf"lr {RATE_TENSOR} \(2,\) of torch.float32"),
    ("lr", torch.ones(0), ValueError, rf"lr {RATE_TENSOR} \(0,\)"),
    ("lr", torch.tensor(1), ValueError, rf"lr {RATE_TENSOR} \(\) of torch.int64"),
    ("weight_decay", torch.tensor(1.0).half(), ValueError, rf"weight_decay {RATE_TENSOR} \(\) of torch.float16"),
    ("lr", Constant, TypeError, f"lr {RATE_TYPE}"),
    ("lr", 10**400, ValueError, f"lr {RATE}"),
    ("betas", 0.9, TypeError, r"betas must be a pair of numbers in \[0, 1\), got 0.9 \(float\)"),
    ("betas", (0.9,), TypeError, "betas must be a pair"),
    ("betas", (0.9, 0.99, 0.999), TypeError, "betas must be a pair"),
    ("betas", "ab", TypeError, "betas must be a pair"),
    ("betas", None, TypeError, "betas must be a pair"),
    ("betas", (0.9, 1.0), ValueError, r"betas\[1\] must be a number in \[0, 1\), got 1.0"),
    ("betas", (1.5, 0.9), ValueError, r"betas\[0\] must be"),
    ("betas", (-0.1, 0.9), ValueError, r"betas\[0\] must be"),
    ("betas", (0.9, math.nan), ValueError, r"betas\[1\] must be"),
    ("betas", ("0.9", 0.9), TypeError, r"betas\[0\] must be"),
    ("betas", {0.9, 0.99}, TypeError, "betas must be a pair"),
    ("betas", {0.9: 1, 0.99: 2}, TypeError, "betas must be a pair"),
    ("betas", (torch.zeros(2), torch.zeros(2)), TypeError, r"betas\[0\] must be"),
    ("eps", -1e-8, ValueError, f"eps {NUMBER}"),
    ("eps", math.nan, ValueError, f"eps {NUMBER}"),
    ("eps", math.inf, ValueError, f"eps {NUMBER}"),
    ("eps", "1e-8", TypeError, f"eps {NUMBER}"),
    ("eps", None, TypeError, f"eps {NUMBER}"),
    ("differentiable", True, RuntimeError, r"use torch.optim.AdamW\(differentiable=True\) where gradients"),
    ("amsgrad", 1, TypeError, f"amsgrad {BOOL}"),
    ("amsgrad", None, TypeError, f"amsgrad {BOOL}"),
    ("maximize", "yes", TypeError, f"maximize {BOOL}"),
    ("max_grad_norm", 0, ValueError, f"max_grad_norm {LIMIT}"),
    ("max_grad_norm", -1.0, ValueError, f"max_grad_norm {LIMIT}"),
    ("max_grad_norm", math.nan, ValueError, f"max_grad_norm {LIMIT}"),
    ("max_grad_norm", -math.inf, ValueError, f"max_grad_norm {LIMIT}"),
    ("max_grad_norm", "1", TypeError, f"max_grad_norm {LIMIT}"),
    ("max_grad_norm", True, TypeError, f"max_grad_norm {LIMIT}"),
]
OF_THE_CONSTRUCTOR: list[tuple[str, Any, type[Exception], str]] = [
    ("lr", torch.tensor(1.0, device="meta"), ValueError, "lr is a tensor on meta"),
    ("skip_nonfinite", 1, TypeError, f"skip_nonfinite {BOOL}"),
    ("skip_nonfinite", None, TypeError, f"skip_nonfinite {BOOL}"),
    ("backend", "gpu", ValueError, r"backend must be one of \('auto', 'native', 'cuda', .*\), got 'gpu'"),
    ("backend", "cuda", ValueError, r"backend='cuda' runs on cuda, but the tensors are on cpu"),
    ("backend", None, TypeError, r"backend must be a string, got None \(NoneType\)"),
    ("fused", 1, TypeError, r"fused must be a bool or None, got 1 \(int\)"),
    ("foreach", "yes", TypeError, "foreach must be a bool or None, got 'yes'"),
    ("capturable", None, TypeError, f"capturable {BOOL}"),
    ("differentiable", 0, TypeError, f"differentiable {BOOL}"),
]
OF_A_GROUP: list[tuple[str, Any, type[Exception], str]] = [
    ("lr_scale", -1.0, ValueError, f"lr_scale {NUMBER}"),
    ("lr_scale", math.nan, ValueError, f"lr_scale {NUMBER}"),
    ("lr_scale", "1", TypeError, f"lr_scale {NUMBER}"),
    ("lr_schedule", 0.1, TypeError, "lr_schedule must be a Schedule or None, got 0.1"),
    ("weight_decay_schedule", "cosine", TypeError, "weight_decay_schedule must be a Schedule or None, got 'cosine'"),
]


def name_of(value: Any) -> str:
    return re.sub(r"\W+", " ", repr(value))[:20]


@pytest.mark.parametrize(("name", "value", "error", "words"), [*BAD, *OF_THE_CONSTRUCTOR], ids=name_of)
def test_a_bad_argument_of_the_constructor(name: str, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FusedAdamW(make_params([(3,)]), **{name: value}).step()


@pytest.mark.parametrize(("name", "value", "error", "words"), [*BAD, *OF_A_GROUP], ids=name_of)
def test_a_bad_option_of_a_group(name: str, value: Any, error: type[Exception], words: str) -> None:
    params = make_params([(3,), (4,)])
    with pytest.raises(error, match=words):
        FusedAdamW([{"params": params[:1]}, {"params": params[1:], name: value}])
    # Added later, it leaves the optimizer as it was.
    optimizer = FusedAdamW(params[:1])
    set_grads(params, make_grads(params))
    optimizer.step()
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": params[1:], name: value})
    assert len(optimizer.param_groups) == 1
    assert same_bits(before, snapshot(optimizer))
    optimizer.add_param_group({"params": params[1:]})
    optimizer.step()
    assert params[1] in optimizer.state


GOOD: list[dict[str, Any]] = [
    {"lr": 0},
    {"lr": np.float64(0.1), "weight_decay": np.float32(0.1), "eps": np.float64(1e-3)},
    {"lr": Fraction(1, 10), "betas": (Fraction(9, 10), 0)},
    {"lr": torch.tensor([0.1]), "weight_decay": torch.tensor(0.0, dtype=torch.float64)},
    {"lr": 1e-320, "eps": 0, "betas": (0, 0)},
    {"betas": [0.9, 0.99], "max_grad_norm": 3, "weight_decay": 100},
    {"max_grad_norm": math.inf},
]


@pytest.mark.parametrize("options", GOOD, ids=repr)
def test_numbers_of_many_kinds_are_taken(backend: str, options: dict[str, Any]) -> None:
    params = make_params([(3,)])
    where = params[0].device
    options = {name: v.to(where) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    optimizer = FusedAdamW(params, backend=backend, **options)
    set_grads(params, make_grads(params))
    optimizer.step()
    assert params[0].isfinite().all()


def test_a_decimal_is_refused() -> None:  # it is no numbers.Real
    with pytest.raises(TypeError, match="lr must be a number"):
        FusedAdamW(make_params([(3,)]), lr=Decimal("0.1"))


# Parameters.


def of(data: Any) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(
            data,
        )
    ]


ONE = of(torch.zeros(3))
IS_OF = "parameter 0 of group 1 is of"
PARAMETERS: dict[str, tuple[Any, Any, str]] = {
    "complex": (
        of(torch.zeros(3, dtype=torch.complex64)),
        TypeError,
        rf"{IS_OF} torch.complex64; FusedAdamW takes float32, .*optimize torch.view_as_real\(p\)",
    ),
    "float8": (of(torch.zeros(3).to(torch.float8_e5m2)), TypeError, f"{IS_OF} torch.float8_e5m2"),
    "sparse": (of(torch.eye(3).to_sparse()), TypeError, "layout torch.sparse_coo; FusedAdamW takes dense"),
    "expanded": (of(torch.zeros(1).expand(3)), ValueError, r"expanded tensor.*pass p.clone\(\)"),
    "lazy": (list(torch.nn.LazyLinear(3).parameters()), TypeError, "run the lazy module once before"),
    "not a leaf": ([torch.zeros(3, requires_grad=True) * 2], ValueError, "non-leaf"),
    "no tensor": ([3.0], TypeError, "optimize Tensors, but one of the params is float"),
    "a set": (set(ONE), TypeError, "ordered iterable of tensors, got"),
    "a number": (3, TypeError, r"iterable of tensors, got 3 \(int\)"),
    "twice": (ONE * 2, ValueError, "twice in this group, as number 0 and as number 1"),
    "named twice": ([("w", ONE[0]), ("v", ONE[0])], ValueError, "twice in this group"),
    "named beside unnamed ones": ([("w", ONE[0])], ValueError, "with/without names"),
    "some named": ([("w", ONE[0]), *of(torch.ones(2))], ValueError, "named|names"),
}


@pytest.mark.parametrize(("given", "error", "words"), PARAMETERS.values(), ids=list(PARAMETERS))
def test_parameters_that_cannot_be_optimized(backend: str, given: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        FusedAdamW([{"params": make_params([(3,)])}, {"params": given}], backend=backend)
    optimizer = FusedAdamW(make_params([(3,)]), backend=backend)
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": given})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        (torch.zeros(3, requires_grad=True), TypeError, "iterable of"),
        (3, TypeError, "iterable"),
        ([{"lr": 0.1}], ValueError, r"must have the key 'params', got \['lr'\]"),
        ([{"params": ONE}, {"params": ONE}], ValueError, "more than one parameter group"),
        (ONE * 2, ValueError, "twice in this group"),
    ],
    ids=["none", "a tensor", "a number", "a group without params", "in two groups", "twice"],
)
def test_lists_that_cannot_be_optimized(backend: str, given: Any, error: Any, words: str) -> None:
    ONE[0].data = torch.zeros(3)  # where the backend runs
    with pytest.raises(error, match=words):
        FusedAdamW(given, backend=backend)


def test_a_name_is_used_in_errors(backend: str) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = FusedAdamW(module.named_parameters(), backend=backend)
    module.bias.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="parameter bias of group 0 has a gradient of layout"):
        optimizer.step()


def test_the_native_backend_is_for_the_cpu() -> None:
    for backend in ("auto", "native"):
        with pytest.raises(ValueError, match="xpu"):
            backends.select(backend, [torch.device("xpu")])
