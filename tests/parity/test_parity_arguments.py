"""Arguments and errors: rows of docs/parity.md."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import re
from typing import Any

import pytest
import torch
from side_by_side import Make, assert_outcomes, both, fused_torch, outcomes, param, state_of

from nexus.optim import FusedAdamW
from nexus.optim.storage import STORAGE_DEFAULTS

THEME = "Arguments and errors"


@pytest.mark.parity(
    "names, order and defaults of the arguments",
    torch="`params, lr, betas, eps, weight_decay, amsgrad`, then by keyword `maximize, foreach, capturable, "
    "differentiable, fused`",
    nexus="the same, and by keyword `max_grad_norm, skip_nonfinite, backend, norm_group, master_weight_bits, "
    "exp_avg_dtype, exp_avg_sq_dtype, stochastic_rounding, average, seed, bias_correction`",
    why="what torch does around the step is done within it, and the state may take fewer bytes",
    also=("test_torch_cases.py::test_every_error_input_is_an_error",),
)
@pytest.mark.parity(
    "`isinstance`",
    torch="a `torch.optim.Optimizer`",
    nexus="a `torch.optim.Optimizer`, and no `torch.optim.AdamW`",
    why="what asks for `AdamW` may count on its kernels and its keys of a group",
)
def test_the_arguments_are_torchs_and_some_more(request: pytest.FixtureRequest) -> None:
    both(lambda make: make([param(1)], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, maximize=False, foreach=None))
    torchs, ours = (inspect.signature(kind).parameters.values() for kind in (torch.optim.AdamW, FusedAdamW))
    shared = [(each.name, each.kind, each.default) for each in torchs]
    assert [(each.name, each.kind, each.default) for each in ours][: len(shared)] == shared
    own = ("max_grad_norm", "skip_nonfinite", "backend", "norm_group", *STORAGE_DEFAULTS, "seed", "bias_correction")
    assert tuple(each.name for each in ours)[len(shared) :] == own
    assert any(f"`{', '.join(own)}`" in mark.kwargs["nexus"] for mark in request.node.iter_markers("parity"))
    peer, optimizer = both(lambda make: make([param(1)]))
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        assert optimizer.defaults[name] == peer.defaults[name]
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not isinstance(optimizer, torch.optim.AdamW)


def stepped(make: Make, **options: Any) -> list[float]:
    """A parameter of 1 after one, two and three steps, with gradients of 1, 2 and 3."""
    own = param(1)
    optimizer = make([own], **options)
    found = []
    for step in range(3):
        own.grad = torch.full_like(own, step + 1.0)
        optimizer.step()
        found += own.tolist()
    return found


def as_torch(**options: Any) -> Any:
    return pytest.approx(stepped(fused_torch, **options), rel=5e-15, abs=1e-14)


def error(words: str, kind: type[Exception] = ValueError) -> Any:
    return pytest.raises(kind, match="^" + re.escape(words))


COMPARED = error("'<=' not supported between instances of 'float'", TypeError)
IN_THE_STEP = error("_fused_adamw_() received an invalid combination", TypeError)
NO_RATE = "lr must be a number >= 0, a one-element tensor or a Schedule, got"
ELEMENT = "lr as a tensor must have one element of float32 or float64"
RANGE = "must be a finite number >= 0, got"
# argument, value, what torch's optimizer makes of it, what nexus's does
VALUES: list[tuple[str, Any, Any, Any]] = [
    ("lr", -1.0, error("Invalid learning rate: -1.0"), error(f"lr {RANGE} -1.0 (float)")),
    ("lr", math.nan, error("Invalid learning rate: nan"), error(f"lr {RANGE} nan (float)")),
    ("eps", -1.0, error("Invalid epsilon value: -1.0"), error(f"eps {RANGE} -1.0 (float)")),
    ("weight_decay", -1.0, error("Invalid weight_decay value: -1.0"), error(f"weight_decay {RANGE} -1.0 (float)")),
    (
        "betas",
        (0.9, 1.0),
        error("Invalid beta parameter at index 1: 1.0"),
        error("betas[1] must be a number in [0, 1), got 1.0 (float)"),
    ),
    ("lr", math.inf, pytest.approx([-math.inf, math.nan, math.nan], nan_ok=True), error(f"lr {RANGE} inf")),
    ("eps", math.inf, pytest.approx([(1 - 1e-5) ** count for count in (1, 2, 3)]), error(f"eps {RANGE} inf")),
    ("lr", "0.1", COMPARED, error(NO_RATE, TypeError)),
    ("lr", None, COMPARED, error(NO_RATE, TypeError)),
    ("lr", True, as_torch(lr=1.0), error(f"{NO_RATE} True (bool)", TypeError)),
    ("amsgrad", "no", IN_THE_STEP, error("amsgrad must be a bool, got 'no'", TypeError)),
    ("maximize", "no", IN_THE_STEP, error("maximize must be a bool, got 'no'", TypeError)),
    ("betas", (0, 0.9), error("betas must be either both floats or both Tensors"), as_torch(betas=(0.0, 0.9))),
    ("lr", torch.ones(2), error("Tensor lr must be 1-element"), error(ELEMENT)),
    ("lr", torch.tensor(1), as_torch(lr=1.0), error(f"{ELEMENT}, got the shape () of torch.int64")),
    ("lr", torch.tensor(1.0).half(), as_torch(lr=1.0), error(f"{ELEMENT}, got the shape () of torch.float16")),
    ("lr", torch.tensor(1.0).bfloat16(), as_torch(lr=1.0), error(f"{ELEMENT}, got the shape () of torch.bfloat16")),
]


@pytest.mark.parity(
    "`lr`, `eps`, `weight_decay` below 0 or NaN, betas outside [0, 1)",
    torch="`ValueError`, as `Invalid learning rate: -1.0`",
    nexus="`ValueError`, as `lr must be a finite number >= 0, got -1.0 (float)`",
    why="an error says which argument, what was given and what is allowed",
    also=("test_arguments.py::test_a_bad_argument_of_the_constructor",),
)
@pytest.mark.parity(
    "an infinite `lr` or `eps`",
    torch="taken; an infinite rate makes the parameters infinite in the first step",
    nexus="`ValueError`",
    why="no training can go on with it",
)
@pytest.mark.parity(
    "`lr` of a wrong type: a string, `None`, `True`",
    torch="`TypeError` of a comparison that does not name it; `True` is taken for 1",
    nexus="`TypeError` that names `lr`",
    why="a rate of `True` is a slip",
)
@pytest.mark.parity(
    "`amsgrad` and `maximize` that are no bools",
    torch="taken; `TypeError` of `_fused_adamw_()` in the first step",
    nexus="`TypeError` that names the argument, at once",
    why="an error belongs where the mistake is",
)
@pytest.mark.parity(
    "betas that are integers: `(0, 0.9)`",
    torch="`ValueError`: betas must be floats",
    nexus="taken as numbers",
    why="0 and 0.0 are the same number",
    also=("test_arguments.py::test_numbers_of_any_library_are_numbers",),
)
@pytest.mark.parity("a tensor `lr` of several elements", torch="`ValueError`")
@pytest.mark.parity(
    "a tensor `lr` of integers or of half precision",
    torch="taken",
    nexus="`ValueError`: float32 or float64",
    why="a rate in half precision has three digits, and a schedule that decays in it stands still",
)
@pytest.mark.parametrize(
    ("name", "value", "torchs", "ours"), VALUES, ids=[f"{name}={value}" for name, value, *_ in VALUES]
)
def test_values_of_the_arguments(name: str, value: Any, torchs: Any, ours: Any) -> None:
    assert_outcomes(functools.partial(stepped, **{name: value}), torchs, ours)
    if isinstance(ours, contextlib.AbstractContextManager):
        with ours:  # at once, and not in the step
            FusedAdamW([param(1)], **{name: value})


@pytest.mark.parity(
    "betas that are two tensors",
    torch="kept as tensors, read in every step",
    also=("test_torch_cases.py::test_every_input_equals_the_for_loop_in_float64",),
)
@outcomes(
    torch=(torch.Tensor, pytest.approx([0.1, 0.9]), pytest.approx([0.56] * 3)),
    nexus=(torch.Tensor, pytest.approx([0.1, 0.9]), pytest.approx([0.56] * 3)),
)
def test_betas_that_are_tensors(make: Make) -> object:
    betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
    own = param(3)
    optimizer = make([own], betas=betas)
    for beta1, grad in ((0.8, 1.0), (0.1, 0.6)):
        betas[0].fill_(beta1)
        own.grad = torch.full_like(own, grad)
        optimizer.step()
    kept = optimizer.param_groups[0]["betas"]
    return type(kept[0]), [float(each) for each in kept], state_of(optimizer)["exp_avg"].tolist()


@pytest.mark.parity(
    "a tensor `lr` beside `foreach=True`",
    torch="`ValueError` unless `capturable=True`; with `fused=True` alone, taken",
    nexus="taken",
    why="there is one implementation, which reads the rate from memory",
)
def test_a_tensor_rate_beside_foreach() -> None:
    fused_torch([param(1)], lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
        torch.optim.AdamW([param(1)], lr=torch.tensor(0.1), foreach=True)
    torch.optim.AdamW([param(1)], lr=torch.tensor(0.1), foreach=True, capturable=True)
    for options in ({"fused": True}, {"foreach": True}, {"foreach": True, "capturable": True}):
        rate = torch.tensor(0.1)
        assert FusedAdamW([param(1)], lr=rate, **options).param_groups[0]["lr"] is rate


@pytest.mark.parity("`foreach=True` with `fused=True`, and `differentiable=True`", torch="`RuntimeError`")
@pytest.mark.parametrize(
    ("other", "words"),
    [
        ("foreach", "`fused` and `foreach` cannot be `True` together"),
        ("differentiable", "`fused` does not support `differentiable`"),
    ],
)
def test_implementations_that_exclude_each_other(other: str, words: str) -> None:
    refused = error(words, RuntimeError)
    with refused:
        torch.optim.AdamW([param(1)], fused=True, **{other: True})
    with refused:
        FusedAdamW([param(1)], fused=True, **{other: True})


@pytest.mark.parity(
    "no parameters, a tensor for a list, numbers for tensors, a parameter in two groups, one that is no leaf",
    torch="`ValueError` or `TypeError`",
)
def test_lists_that_no_optimizer_takes() -> None:
    one = param(1)
    for given in ([], one, 3, [3.0], [{"params": [one]}, {"params": [one]}], [param(1) * 2]):
        told = []
        for make in (fused_torch, FusedAdamW):
            with pytest.raises((TypeError, ValueError)) as caught:
                make(given)
            told.append((caught.type, str(caught.value)))
        assert told[0] == told[1]


@pytest.mark.parity(
    "the same parameter twice in a group",
    torch="a warning, and two updates in each step, counted",
    nexus="`ValueError`",
    why="nobody means to train at twice the rate",
    also=("test_arguments.py::test_parameters_that_cannot_be_optimized",),
)
def test_the_same_parameter_twice() -> None:
    one = param(1)
    with pytest.warns(UserWarning, match="parameter group with duplicate parameters"):
        peer = fused_torch([one, one], lr=0.1, weight_decay=0.0)
    one.grad = torch.ones_like(one)
    peer.step()
    assert int(state_of(peer)["step"]) == 2
    assert one.item() < 0.85  # one update of Adam's is the rate, 0.1
    with pytest.raises(ValueError, match="a parameter is twice in this group"):
        FusedAdamW([one, one])
