"""Arguments and errors: rows of docs/parity.md."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from references import PARAMS as TOLERANCE
from references import assert_close
from side_by_side import (
    Make,
    assert_same,
    both,
    errors,
    fused_torch,
    of_this_torch,
    param,
    params_of,
    same_of_both,
    state_of,
    train,
)
from torch.optim import lr_scheduler

from nexus.optim import FusedAdamW

pytestmark = of_this_torch

NUMBERS = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")


@pytest.mark.parity(
    "Arguments and errors",
    "names, order and defaults of the arguments",
    torch="`params, lr, betas, eps, weight_decay, amsgrad`, then by keyword `maximize, foreach, capturable, "
    "differentiable, fused`",
    nexus="the same, and by keyword `max_grad_norm, skip_nonfinite, backend, norm_group`",
    why="what torch does around the step is done within it",
    also=("test_torch_cases.py::test_every_error_input_is_an_error",),
)
def test_the_arguments_are_torchs_and_four_more() -> None:
    both(lambda make: make([param(1)], 1e-3, (0.9, 0.999), 1e-8, 1e-2, False, maximize=False, foreach=None))
    torchs, ours = (inspect.signature(kind).parameters for kind in (torch.optim.AdamW, FusedAdamW))
    shared = [(each.name, each.kind, each.default) for each in torchs.values()]
    assert [(each.name, each.kind, each.default) for each in ours.values()][: len(shared)] == shared
    torchs_defaults, our_defaults = both(lambda make: make([param(1)]).defaults)
    assert our_defaults.items() >= {name: torchs_defaults[name] for name in NUMBERS}.items()
    assert list(ours)[len(shared) :] == ["max_grad_norm", "skip_nonfinite", "backend", "norm_group"]


@pytest.mark.parity(
    "Arguments and errors",
    "`isinstance`",
    torch="a `torch.optim.Optimizer`",
    nexus="a `torch.optim.Optimizer`, and no `torch.optim.AdamW`",
    why="what asks for `AdamW` may count on its kernels and its keys of a group",
)
def test_it_is_an_optimizer_and_no_adamw() -> None:
    first, second = both(lambda make: make([param(1)]))
    assert isinstance(first, torch.optim.Optimizer)
    assert isinstance(second, torch.optim.Optimizer)
    assert not isinstance(second, torch.optim.AdamW)
    assert second.backend == "native"


@pytest.mark.parity(
    "Arguments and errors",
    "`lr`, `eps`, `weight_decay` below 0 or NaN, betas outside [0, 1)",
    torch="`ValueError`, as `Invalid learning rate: -1.0`",
    nexus="`ValueError`, as `lr must be a finite number >= 0, got -1.0 (float)`",
    why="an error says which argument, what was given and what is allowed",
    also=("test_arguments.py::test_a_bad_argument_of_the_constructor",),
)
@pytest.mark.parametrize(
    ("name", "value", "torchs", "ours"),
    [
        ("lr", -1.0, "learning rate: -1.0", "lr must be a finite number >= 0, got -1.0"),
        ("lr", math.nan, "learning rate: nan", "lr must be a finite number >= 0, got nan"),
        ("eps", -1.0, "epsilon value: -1.0", "eps must be a finite number >= 0, got -1.0"),
        ("weight_decay", -1.0, "weight_decay value: -1.0", "weight_decay must be a finite number >= 0, got -1.0"),
        ("betas", (0.9, 1.0), "beta parameter at index 1: 1.0", "betas[1] must be a number in [0, 1), got 1.0"),
    ],
)
def test_values_out_of_range_are_value_errors(name: str, value: Any, torchs: str, ours: str) -> None:
    first, second = errors(lambda make: make([param(1)], **{name: value}))
    assert first == f"ValueError: Invalid {torchs}"
    assert second == f"ValueError: {ours} (float)"


@pytest.mark.parity(
    "Arguments and errors",
    "an infinite `lr` or `eps`",
    torch="taken; an infinite rate makes the parameters infinite in the first step",
    nexus="`ValueError`",
    why="no training can go on with it",
)
@pytest.mark.parametrize("name", ["lr", "eps"])
def test_infinity_is_taken_by_torch_and_refused_by_nexus(name: str) -> None:
    peer = fused_torch([param(1)], **{name: math.inf})
    train(peer, steps=1)
    assert params_of(peer)[0].isinf().all() == (name == "lr")
    with pytest.raises(ValueError, match=f"{name} must be a finite number >= 0, got inf"):
        FusedAdamW([param(1)], **{name: math.inf})


@pytest.mark.parity(
    "Arguments and errors",
    "`lr` of a wrong type: a string, `None`, `True`",
    torch="`TypeError` of a comparison that does not name it; `True` is taken for 1",
    nexus="`TypeError` that names `lr`",
    why="a rate of `True` is a slip",
)
def test_rates_of_a_wrong_type() -> None:
    for value in ("0.1", None):
        first, second = errors(lambda make, value=value: make([param(1)], lr=value))
        assert first.startswith("TypeError: '<=' not supported between instances of 'float'")
        assert second.startswith("TypeError: lr must be a number >= 0, a one-element tensor or a Schedule, got")
    peer, one = fused_torch([param(1)], lr=True), fused_torch([param(1)], lr=1.0)
    for optimizer in (peer, one):
        torch.manual_seed(0)
        train(optimizer)
    assert torch.equal(params_of(peer)[0], params_of(one)[0])
    with pytest.raises(TypeError, match=r"lr must be a number.*got True \(bool\)"):
        FusedAdamW([param(1)], lr=True)


@pytest.mark.parity(
    "Arguments and errors",
    "`amsgrad` and `maximize` that are no bools",
    torch="taken; `TypeError` of `_fused_adamw_()` in the first step",
    nexus="`TypeError` that names the argument, at once",
    why="an error belongs where the mistake is",
)
@pytest.mark.parametrize("name", ["amsgrad", "maximize"])
def test_options_that_are_no_bools(name: str) -> None:
    peer = fused_torch([param(1)], **{name: "no"})
    with pytest.raises(TypeError, match=r"^_fused_adamw_\(\) received an invalid combination"):
        train(peer, steps=1)
    with pytest.raises(TypeError, match=f"{name} must be a bool, got 'no'"):
        FusedAdamW([param(1)], **{name: "no"})


@pytest.mark.parity(
    "Arguments and errors",
    "betas that are integers: `(0, 0.9)`",
    torch="`ValueError`: betas must be floats",
    nexus="taken as numbers",
    why="0 and 0.0 are the same number",
    also=("test_arguments.py::test_numbers_of_any_library_are_numbers",),
)
def test_betas_that_are_integers() -> None:
    with pytest.raises(ValueError, match="betas must be either both floats or both Tensors"):
        fused_torch([param(1)], betas=(0, 0.9))
    runs = [fused_torch([param(3)], betas=(0.0, 0.9)), FusedAdamW([param(3)], betas=(0, 0.9))]
    for optimizer in runs:
        torch.manual_seed(0)
        train(optimizer)
    assert_same(*runs)


@pytest.mark.parity(
    "Arguments and errors",
    "betas that are two tensors",
    torch="kept as tensors, read in every step",
    nexus="read once, kept as floats",
    why="reading them in each step would wait for the device",
    also=("test_torch_cases.py::test_every_input_equals_the_for_loop_in_float64",),
)
def test_betas_that_are_tensors() -> None:
    def with_tensors(make: Make) -> tuple[type, torch.optim.Optimizer]:
        betas = (torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64))
        optimizer = make([param(3)], betas=betas)
        train(optimizer)
        kind = type(optimizer.param_groups[0]["betas"][0])
        betas[0].fill_(0.1)
        train(optimizer, steps=1)
        return kind, optimizer

    (first, peer), (second, ours) = both(with_tensors)
    assert (first, second) == (torch.Tensor, float)
    assert ours.param_groups[0]["betas"] == (0.8, 0.9)
    assert not torch.allclose(state_of(peer)["exp_avg"], state_of(ours)["exp_avg"])  # of the last step alone


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parity(
    "Rates and schedulers",
    "`OneCycleLR` and `CyclicLR` with momenta that are tensors, which leave a tensor beside a float in `betas`",
    torch="taken",
    nexus="same: the tensor is read at the next step",
    why="the group keeps a pair of floats, in which no change goes unnoticed",
)
@same_of_both
def test_momenta_that_are_tensors(make: Make, scheduler: str) -> object:
    optimizer = make([param(3)], lr=0.1)
    momenta = {"base_momentum": torch.tensor(0.85), "max_momentum": torch.tensor(0.95)}
    own = (
        lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12, **momenta)
        if scheduler == "OneCycleLR"
        else lr_scheduler.CyclicLR(optimizer, 0.05, 0.2, step_size_up=3, **momenta)
    )
    for _ in range(10):
        train(optimizer, 1)
        own.step()
    return optimizer


@pytest.mark.parity(
    "Arguments and errors",
    "a tensor `lr` of several elements",
    torch="`ValueError`",
    nexus="same",
)
def test_a_rate_of_several_elements_is_a_value_error() -> None:
    first, second = errors(lambda make: make([param(1)], lr=torch.ones(2)))
    assert first == "ValueError: Tensor lr must be 1-element"
    assert second.startswith("ValueError: lr as a tensor must have one element")


@pytest.mark.parity(
    "Arguments and errors",
    "a tensor `lr` of integers or of half precision",
    torch="taken",
    nexus="`ValueError`: float32 or float64",
    why="a rate in half precision has three digits, and a schedule that decays in it stands still",
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_rates_of_other_dtypes(dtype: torch.dtype) -> None:
    peer = fused_torch([param(1)], lr=torch.tensor(1, dtype=dtype), weight_decay=0.0)
    train(peer, steps=1)
    assert_close(params_of(peer)[0], torch.zeros(1), TOLERANCE[torch.float32])
    with pytest.raises(ValueError, match=f"lr as a tensor must have one element of float32 or float64.*{dtype}"):
        FusedAdamW([param(1)], lr=torch.tensor(1, dtype=dtype))


@pytest.mark.parity(
    "Arguments and errors",
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


@pytest.mark.parity(
    "Arguments and errors",
    "`foreach=True` with `fused=True`, and `differentiable=True`",
    torch="`RuntimeError`",
    nexus="same",
)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"foreach": True, "fused": True}, "RuntimeError: `fused` and `foreach` cannot be `True` together"),
        ({"differentiable": True, "fused": True}, "RuntimeError: `fused` does not support `differentiable`"),
    ],
    ids=str,
)
def test_implementations_that_exclude_each_other(options: dict[str, bool], words: str) -> None:
    def make_it(make: Make) -> object:
        return (torch.optim.AdamW if make is fused_torch else make)([param(1)], **options)

    assert all(error.startswith(words) for error in errors(make_it))


@pytest.mark.parity(
    "Arguments and errors",
    "no parameters, a tensor for a list, numbers for tensors, a parameter in two groups, one that is no leaf",
    torch="`ValueError` or `TypeError`",
    nexus="same",
)
def test_lists_that_no_optimizer_takes() -> None:
    one = param(1)
    for given in ([], one, 3, [3.0], [{"params": [one]}, {"params": [one]}], [param(1) * 2]):
        first, second = errors(lambda make, given=given: make(given))
        assert first == second


@pytest.mark.parity(
    "Arguments and errors",
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
