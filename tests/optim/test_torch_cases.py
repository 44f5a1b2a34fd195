"""PyTorch's own cases for AdamW (`optim_db`, and what its test_optim.py does with them), run by a FusedAdamW."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, copies, make_params, step_both
from side_by_side import fused_torch, train
from torch import Tensor

from nexus.optim import FusedAdamW

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The options that ask torch for one implementation or another.
IMPLEMENTATIONS: list[dict[str, Any]] = [
    {},
    {"foreach": False, "fused": False, "differentiable": False},
    {"foreach": True},
    {"fused": True},
]


@functools.cache
def info() -> Any:
    """What PyTorch tests AdamW with."""
    pytest.importorskip("expecttest")  # which torch.testing's module imports
    from torch.testing._internal.common_optimizers import optim_db

    (found,) = [each for each in optim_db if each.optim_cls is torch.optim.AdamW]
    return found


def cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, dict[str, Any]]]:
    """(description, options): those for CUDA include those for the CPU."""
    for each in info().optim_inputs_func("cuda", dtype):
        yield each.desc, copy.deepcopy(each.kwargs)


def as_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """For the reference: numbers for tensors, and nothing of implementations."""
    of_implementations = ("capturable", "foreach", "fused", "differentiable")
    plain = {key: value for key, value in options.items() if key not in of_implementations}
    if isinstance(plain.get("lr"), Tensor):
        plain["lr"] = float(plain["lr"])
    if "betas" in plain:
        plain["betas"] = tuple(float(beta) for beta in plain["betas"])
    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_input_equals_the_for_loop_in_float64(backend: str, dtype: torch.dtype) -> None:
    own: list[dict[str, Any]] = [{}, {"lr": 0.1, "weight_decay": 0.0}, {"weight_decay": 0.5}, {}]
    for (description, options), implementation in itertools.product(cases(dtype), IMPLEMENTATIONS):
        views = {
            "contiguous": torch.randn(2, 3),
            "transposed": torch.randn(3, 2, 5).transpose(0, 2),
            "every other element": torch.randn(5, 2)[..., 0],
            "one number": torch.randn(()),
        }
        params = [torch.nn.Parameter(view.to(dtype)) for view in views.values()]
        groups = [{"params": [param], **option} for param, option in zip(params, own, strict=True)]
        given = copy.deepcopy({**options, **implementation})
        reference = Float64AdamW([dict(group) for group in groups], **as_numbers(given))
        optimizer = FusedAdamW(groups, backend=backend, **given)
        step_both(optimizer, reference, steps=5)
        assert_same_run(optimizer, reference, description)
    seen = {description for description, _ in cases(dtype)}
    assert {"default", "amsgrad", "Tensor lr, Tensor betas, with capturable"} <= seen


# Torch's error inputs, by their descriptions: the words here, and why the type is another one where it is.
WORDS = {
    "invalid param type": "params argument given to the optimizer should be an iterable of Tensors or dicts",
    "a param group cannot have duplicate parameters": "a parameter is twice in this group",
    "duplicate parameters should not occur across param groups either": "appear in more than one parameter group",
    "Tensor lr must be 1-element": "lr as a tensor must have one element",
    "all optimizer params should be with/without names": "all optimizer params should be with/without names",
    "all optimizer param groups should be with/without names.": "all optimizer param groups should be with/without",
    "beta1 should be between 0 and 1": r"betas\[0\] must be a number in \[0, 1\), got 1.0",
    "weight_decay should > 0": "weight_decay must be a finite number >= 0, got -1",
    "betas must be either both floats or both Tensors": "betas must be either both floats or both Tensors",
}
OTHER_TYPES: dict[str, type[Exception]] = {
    # An update that is made twice is never what was meant: more than a warning.
    "a param group cannot have duplicate parameters": ValueError,
}
# Limits of torch's foreach implementation, which FusedAdamW does not have.
ALLOWED = {
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}
# For tensors on a GPU alone; see test_parity_arguments.py.
OF_CUDA = {
    "`fused` and `foreach` cannot be `True` together",
    "`fused` does not support `differentiable`",
}


def test_every_error_input_is_an_error() -> None:
    seen = set()
    for each in info().optim_error_inputs_func("cpu", torch.float32):
        given = each.optimizer_error_input
        seen.add(given.desc)
        params = given.params if given.params is not None else make_params([(1,)])
        if given.desc in ALLOWED:
            FusedAdamW(params, **given.kwargs)
            continue
        words = given.desc if given.desc in OF_CUDA else WORDS[given.desc]
        with pytest.raises(OTHER_TYPES.get(given.desc, each.error_type), match=words):
            FusedAdamW(params, **given.kwargs)
    assert seen - OF_CUDA == ALLOWED | set(WORDS)


# State dicts.


@pytest.mark.parametrize("missing", ["maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable"])
def test_it_can_load_an_older_state_dict(backend: str, missing: str) -> None:
    for _, options in cases():
        params = make_params([(4, 3), (4,)])
        optimizer, peer = FusedAdamW(params, backend=backend, **options), torch.optim.AdamW(copies(params))
        train(optimizer)
        peer.load_state_dict(optimizer.state_dict())
        older = peer.state_dict()
        for group in older["param_groups"]:
            del group[missing]
        for each in (optimizer, peer):
            each.load_state_dict(older)
        train(optimizer, 1)
        for name in ("amsgrad", "maximize"):
            assert optimizer.param_groups[0][name] == peer.param_groups[0][name]


@pytest.mark.parity(
    "State dicts",
    "names of parameters, on loading",
    torch="come from the state dict, if it has some",
    nexus="same",
)
@pytest.mark.parametrize("named_before", [False, True])
@pytest.mark.parametrize("named_after", [False, True])
def test_names_come_from_the_state_dict_if_it_has_them(named_before: bool, named_after: bool) -> None:
    def given(named: bool, prefix: str) -> Any:
        pairs = [(prefix + name, param) for name, param in torch.nn.Linear(3, 2).named_parameters()]
        return pairs if named else [param for _, param in pairs]

    before = FusedAdamW(given(named_before, "before."), lr=0.5)
    train(before, 1)
    after = FusedAdamW(given(named_after, "after."))
    peer = fused_torch(given(named_after, "after."))
    for optimizer in (after, peer):
        optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, 1)
    assert after.param_groups[0].get("param_names") == peer.param_groups[0].get("param_names")
    assert after.param_groups[0]["lr"] == 0.5
