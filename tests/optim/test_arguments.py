"""Arguments: a bad one is named, with what was given and what is allowed; numbers of any library are numbers."""

from __future__ import annotations

import math
import re
from collections import UserList
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from references import copies, make_params, same_bits, snapshot
from side_by_side import train, train_alike
from torch.optim.lr_scheduler import StepLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Linear
from nexus.training.schedulers import ScheduleLR

RATE = "must be a number >= 0, a one-element tensor or a Schedule, got"
RATE_TENSOR = "as a tensor must have one element of float32 or float64, got the shape"
NUMBER = "must be a finite number >= 0, got"
BETA = r"must be a number in \[0, 1\), got"
PAIR = r"must be a pair, each a number in \[0, 1\), a one-element tensor or a Schedule, got"
BOOL = "must be a bool, got"
LIMIT = "must be a finite number >= 0, got .*None or 0 does not clip, math.inf measures the norm alone"
SCHEDULE = "must be a Schedule or None, got"

# the argument, its bad values, the error
Bad = list[tuple[str, tuple[Any, ...], type[Exception], str]]
BAD: Bad = [
    ("lr", (-1e-9, math.nan, math.inf, 10**400), ValueError, f"lr {NUMBER}"),
    ("weight_decay", (-1e-9, math.nan, math.inf), ValueError, f"weight_decay {NUMBER}"),
    ("lr", ("0.1", None, True, 1j, [0.1], Constant, Decimal("0.1")), TypeError, f"lr {RATE}"),
    ("weight_decay", ("0.1", None, True, 1j, [0.1]), TypeError, f"weight_decay {RATE}"),
    ("lr", (torch.ones(2),), ValueError, rf"lr {RATE_TENSOR} \(2,\) of torch.float32"),
    ("lr", (torch.ones(0),), ValueError, rf"lr {RATE_TENSOR} \(0,\)"),
    ("lr", (torch.tensor(1),), ValueError, rf"lr {RATE_TENSOR} \(\) of torch.int64"),
    ("weight_decay", (torch.tensor(1.0).half(),), ValueError, rf"weight_decay {RATE_TENSOR} \(\) of torch.float16"),
    ("betas", (0.9,), TypeError, rf"betas {PAIR} 0.9 \(float\)"),
    ("betas", ((0.9,), (0.9, 0.99, 0.999), "ab", None, {0.9, 0.99}, {0.9: 1, 0.99: 2}), TypeError, f"betas {PAIR}"),
    ("betas", ((0.9, 1.0),), ValueError, rf"betas\[1\] {BETA} 1.0"),
    ("betas", ((1.5, 0.9),), ValueError, rf"betas\[0\] {BETA}"),
    ("betas", ((-0.1, 0.9),), ValueError, rf"betas\[0\] {NUMBER}"),
    ("betas", ((0.9, math.nan),), ValueError, rf"betas\[1\] {NUMBER}"),
    ("betas", (("0.9", 0.9),), TypeError, rf"betas\[0\] {NUMBER}"),
    ("betas", ((torch.zeros(2), torch.zeros(2)),), ValueError, rf"betas\[0\] {RATE_TENSOR} \(2,\)"),
    ("betas", ((torch.tensor(0.5), torch.tensor(1.0)),), ValueError, rf"betas\[1\] {BETA} 1.0"),
    (
        "betas",
        ((0.9, Linear(start_lr=0.9, end_lr=1.0, total_steps=10)),),
        ValueError,
        r"betas\[1\] must stay in \[0, 1\), .* is 1.0 at step 10",
    ),
    ("bias_correction", ("none",), ValueError, r"bias_correction must be one of \('product', 'power'\), got 'none'"),
    ("bias_correction", (True, None), TypeError, r"bias_correction must be one of \('product', 'power'\)"),
    ("eps", (-1e-8, math.nan, math.inf), ValueError, f"eps {NUMBER}"),
    ("eps", ("1e-8", None), TypeError, f"eps {NUMBER}"),
    ("differentiable", (True,), RuntimeError, r"use torch.optim.AdamW\(differentiable=True\) where gradients"),
    ("amsgrad", (1, None), TypeError, f"amsgrad {BOOL}"),
    ("maximize", ("yes",), TypeError, f"maximize {BOOL}"),
    ("max_grad_norm", (-1.0, math.nan, -math.inf), ValueError, f"max_grad_norm {LIMIT}"),
    ("max_grad_norm", ("1", True), TypeError, f"max_grad_norm {LIMIT}"),
    (
        "max_grad_norm",
        (Linear(start_lr=0.0, end_lr=1.0, total_steps=10),),
        ValueError,
        "max_grad_norm must stay above 0, .* is 0.0 at step 0.*; the number 0, or None, does not clip",
    ),
    (
        "max_grad_norm",
        (torch.zeros(()),),
        ValueError,
        "max_grad_norm must be a finite number > 0.*; the number 0, or None",
    ),
    ("eps", (torch.tensor(-1.0),), ValueError, f"eps {NUMBER}"),
]
OF_THE_CONSTRUCTOR: Bad = [
    ("lr", (torch.tensor(1.0, device="meta"),), ValueError, "lr is a tensor on meta"),
    ("skip_nonfinite", (1, None), TypeError, f"skip_nonfinite {BOOL}"),
    ("backend", ("gpu",), ValueError, r"backend must be one of \('auto', 'native', 'cuda', .*\), got 'gpu'"),
    ("backend", ("cuda",), ValueError, r"backend='cuda' runs on cuda, but the tensors are on cpu"),
    ("norm_group", ("world", 3, [0, 1]), TypeError, "norm_group must be a ProcessGroup of torch.distributed or None"),
    ("backend", (None,), TypeError, r"backend must be a string, got None \(NoneType\)"),
    ("fused", (1,), TypeError, r"fused must be a bool or None, got 1 \(int\)"),
    ("foreach", ("yes",), TypeError, "foreach must be a bool or None, got 'yes'"),
    ("capturable", (None,), TypeError, f"capturable {BOOL}"),
    ("differentiable", (0,), TypeError, f"differentiable {BOOL}"),
]
OF_A_GROUP: Bad = [
    ("lr_scale", (-1.0, math.nan), ValueError, f"lr_scale {NUMBER}"),
    ("lr_scale", ("1",), TypeError, f"lr_scale {NUMBER}"),
    ("lr_schedule", (0.1,), TypeError, f"lr_schedule {SCHEDULE} 0.1"),
    ("weight_decay_schedule", ("cosine",), TypeError, f"weight_decay_schedule {SCHEDULE} 'cosine'"),
]


def each_of(table: Bad) -> pytest.MarkDecorator:
    """A case for each value."""
    cases = [(name, value, error, words) for name, values, error, words in table for value in values]
    ids = [f"{name} {re.sub(r'[^a-zA-Z0-9.]+', ' ', repr(value))[:20]}" for name, value, *_ in cases]
    return pytest.mark.parametrize(("name", "value", "error", "words"), cases, ids=ids)


@each_of(BAD + OF_THE_CONSTRUCTOR)
def test_a_bad_argument_of_the_constructor(name: str, value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        FusedAdamW(make_params([(3,)]), **{name: value}).step()


@each_of(BAD + OF_A_GROUP)
def test_a_bad_option_of_a_group(name: str, value: Any, error: type[Exception], words: str) -> None:
    params = make_params([(3,), (4,)])
    with pytest.raises(error, match=words):
        FusedAdamW([{"params": params[:1]}, {"params": params[1:], name: value}])
    # Added later, it leaves the optimizer as it was.
    optimizer = FusedAdamW(params[:1])
    train(optimizer, 1)
    before = snapshot(optimizer)
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": params[1:], name: value})
    assert len(optimizer.param_groups) == 1
    assert same_bits(before, snapshot(optimizer))
    optimizer.add_param_group({"params": params[1:]})
    train(optimizer, 1)
    assert params[1] in optimizer.state


# Numbers.


def of_kind(number: Callable[[float], Any]) -> dict[str, Any]:
    """Every option as such a number. The values are exact in half precision."""
    plain = {"lr": 0.25, "eps": 2.0**-20, "weight_decay": 0.125, "max_grad_norm": 0.5}
    return {name: number(value) for name, value in plain.items()} | {"betas": (number(0.75), number(0.875))}


NUMBERS: dict[str, dict[str, Any]] = {
    "float64 of NumPy": of_kind(numpy.float64),
    "float32 of NumPy": of_kind(numpy.float32),
    "float16 of NumPy": of_kind(numpy.float16),
    "0-dim arrays": of_kind(numpy.array),
    "no limit, as 0-dim array": {"max_grad_norm": numpy.array(math.inf)},
    "fractions": of_kind(Fraction),
    "integers": {"lr": 0, "betas": (0, 0), "eps": 0, "weight_decay": 100, "max_grad_norm": 3},
    "the smallest": {"lr": 1e-320, "eps": 0, "max_grad_norm": math.inf},
    "tensors": {"lr": torch.tensor([0.1]), "weight_decay": torch.tensor(0.0, dtype=torch.float64)},
    "betas: a list": {"betas": [0.9, 0.99]},
    "betas: of a configuration library": {"betas": UserList([0.9, 0.99])},
    "betas: an array": {"betas": numpy.array([0.9, 0.99])},
}


@pytest.mark.parametrize("given", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_any_library_are_numbers(backend: str, given: dict[str, Any]) -> None:
    start = make_params([(3,)])
    given = {name: v.to(start[0].device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    plain = {name: tuple(map(float, v)) if name == "betas" else float(v) for name, v in given.items()}
    expected, at_once, later = (
        FusedAdamW(copies(start), backend=backend, **options) for options in (plain, given, {})
    )
    later.param_groups[0].update(given)
    for optimizer in (expected, at_once, later):
        torch.manual_seed(2)
        train(optimizer)
        group = optimizer.param_groups[0]
        assert {name: group[name] for name in plain} == plain
        kept = [group[name] for name in plain if name != "betas" and not isinstance(given[name], torch.Tensor)]
        assert all(isinstance(value, int | float) for value in kept)  # no array, which may change later
        assert same_bits(snapshot(optimizer), snapshot(expected))


# Parameters.


def of(data: torch.Tensor) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(data)]


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


@pytest.mark.parametrize(("given", "error", "words"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_that_cannot_be_optimized(given: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        FusedAdamW([{"params": make_params([(3,)])}, {"params": given}])
    optimizer = FusedAdamW(make_params([(3,)]))
    with pytest.raises(error, match=words):
        optimizer.add_param_group({"params": given})
    assert len(optimizer.param_groups) == 1


def test_a_group_without_parameters_is_named() -> None:
    with pytest.raises(ValueError, match=r"must have the key 'params', got \['lr'\]"):
        FusedAdamW([{"lr": 0.1}])


def test_a_name_is_used_in_errors() -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = FusedAdamW(module.named_parameters())
    phase = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match=r"parameter phase of group 1 is of torch\.complex64"):
        optimizer.add_param_group({"params": [("phase", phase)]})
    module.bias.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match="parameter bias of group 0 has a gradient of layout"):
        optimizer.step()


@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (
            lambda: StepLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 3),
            r"take_over\(scheduler\).*from_torch\(scheduler\)",
        ),
        (lambda: [Constant(1.0)], "give each group its own"),
        (
            lambda: WSD,
            r"that is a class: write WSD\(warmup_steps=\.\.\., stable_steps=\.\.\., decay_steps=\.\.\., peak_lr=",
        ),
        (lambda: StepLR, "that is a class"),
        (lambda: lambda step: 1.0, r"Schedule.from_function\(fn, steps\)"),
        (
            lambda: ScheduleLR(torch.optim.SGD([torch.zeros(1)]), Constant(1.0)),
            "give its Schedule: scheduler.schedule",
        ),
        (lambda: "1e-3", r"that is a string \(YAML reads 1e-3 as one.*: write 0.001"),
        (lambda: "none", "that is a string: leave it out, or write None where that is allowed"),
        (lambda: "cosine", r"that is a string: write the Schedule, such as Cosine\(.*from_transformers\("),
        (lambda: Constant(1.0).to_dict(), "Schedule.from_dict makes a Schedule"),
        (lambda: {"head": 1.0}, "give each group its own"),
    ],
    ids=[
        "scheduler",
        "list",
        "class",
        "torch's class",
        "function",
        "nexus's",
        "number",
        "none",
        "name",
        "saved",
        "dict",
    ],
)
@pytest.mark.parametrize("name", ["lr", "weight_decay", "eps", "max_grad_norm", "lr_scale", "betas"])
def test_what_is_nearly_a_rate_has_a_remedy(name: str, wrong: Callable[[], object], remedy: str) -> None:
    if name != "lr":
        remedy = remedy.removeprefix(r"take_over\(scheduler\).*")
    value = (wrong(), 0.99) if name == "betas" else wrong()
    groups = [{"params": make_params([(3,)]), name: value}]
    with pytest.raises(TypeError, match=rf"{name}.* must be .*, got .*; .*{remedy}"):
        FusedAdamW(groups)


@pytest.mark.parametrize("adds", [False, True])
def test_a_key_that_is_nearly_a_setting_is_warned_of_where_it_was_given(adds: bool) -> None:
    def group(**keys: object) -> dict[str, Any]:
        return {"params": make_params([(3,)]), **keys}

    FusedAdamW(
        [
            group(
                name="head",
                lr_mult=0.1,
                weight_decay_mult=0.0,
                initial_lr=1.0,
                layer_id=3,
                fused=None,
                eps2=1.0,
                no_weight_decay=True,
            )
        ]
    )
    optimizer = FusedAdamW([group()])
    give = optimizer.add_param_group if adds else lambda group: FusedAdamW([group])
    words = r"a group has 'weight_decy', which no step reads; did you mean 'weight_decay'\?"
    with pytest.warns(UserWarning, match=words) as said:
        give(group(weight_decy=0.0))
    assert [Path(each.filename) for each in said] == [Path(__file__)]


@pytest.mark.parametrize(
    "params",
    [
        lambda model: model,
        lambda model: [model],
        lambda model: [{"params": model}],
        lambda model: [{"params": [model[0], model[1]]}],
    ],
    ids=["model", "list", "group", "group of modules"],
)
def test_a_module_is_no_parameter(params: Callable[[torch.nn.Sequential], Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    words = (
        r"params must be parameters, got the module (Sequential|Linear): give model\.parameters\(\); .*param_groups\("
    )
    with pytest.raises(TypeError, match=words):
        FusedAdamW(params(model))
    optimizer = FusedAdamW(torch.nn.ParameterList(model.parameters()))
    assert len(optimizer.param_groups[0]["params"]) == 4
    with pytest.raises(TypeError, match=words):
        optimizer.add_param_group({"params": model})


def test_what_is_nearly_parameters_has_a_remedy() -> None:
    model: Any = torch.nn.Linear(2, 2)
    for wrong, words in (
        (model.parameters, r"got the method parameters: call it, parameters\(\)"),
        (model.state_dict(), r"got a OrderedDict: give model.parameters\(\)"),
        ({"params": model.parameters()}, r"got a dict: give a list of groups: \[{'params'"),
    ):
        with pytest.raises(TypeError, match=f"params must be parameters, {words}"):
            FusedAdamW(wrong)


@pytest.mark.parametrize("off", [0, 0.0, -0.0, None, numpy.float32(0.0)])
def test_a_limit_of_the_norm_of_0_is_none(backend: str, off: float | None) -> None:
    params = make_params([(3,), (5,)])
    beside = copies(params)
    optimizer = FusedAdamW(params, max_grad_norm=off, backend=backend)
    assert optimizer.param_groups[0]["max_grad_norm"] is None
    train_alike(optimizer, FusedAdamW(beside, backend=backend))
    assert optimizer.grad_norm is None
    assert same_bits(params, beside)


def test_a_limit_is_switched_off_between_steps() -> None:
    params = make_params([(3,)])
    beside = copies(params)
    both = [FusedAdamW(each, max_grad_norm=1e-3) for each in (params, beside)]
    train_alike(*both)
    for optimizer, off in zip(both, (0, None), strict=True):
        optimizer.param_groups[0]["max_grad_norm"] = off
        assert optimizer.grad_norm is None
    train_alike(*both)
    assert same_bits(params, beside)
