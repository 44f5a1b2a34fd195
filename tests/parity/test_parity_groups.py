"""Parameter groups: rows of docs/parity.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from references import make_grads, make_params, set_grads
from side_by_side import (
    Make,
    assert_found_the_same,
    assert_same,
    both,
    fused_torch,
    of_this_torch,
    param,
    params_of,
    same_of_both,
    state_of,
    train,
)
from torch import nn
from torch.optim import Optimizer

from nexus.optim import FusedAdamW

pytestmark = of_this_torch


@pytest.mark.parity("Parameter groups", "each group has options of its own", torch="yes", nexus="same")
def test_options_by_group(backend: str) -> None:
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"eps": 1e-2, "weight_decay": 0.0, "amsgrad": True},
        {"maximize": True},
    ]

    def run(make: Make) -> Optimizer:
        optimizer = make([{"params": make_params([(5,)], torch.float64), **each} for each in options], lr=0.01)
        train(optimizer, steps=10)
        return optimizer

    assert_same(*both(run, backend))


@pytest.mark.parity(
    "Parameter groups",
    "an option of a group, or one that is changed between steps, out of range",
    torch="taken: only the constructor's own arguments are checked. A negative rate climbs",
    nexus="`ValueError`, by the constructor, `add_param_group` or the next step; nothing is changed",
    why="an error belongs where the mistake is",
    also=(
        "test_arguments.py::test_a_bad_option_of_a_group",
        "test_rates_torch.py::test_a_bad_change_is_refused_and_changes_nothing",
    ),
)
def test_a_bad_option_of_a_group_or_in_mid_run() -> None:
    def run(make: Make) -> Optimizer:
        optimizer = make([{"params": [param(3)], "lr": 0.1}])
        optimizer.param_groups[0]["lr"] = -0.2
        train(optimizer, steps=1)
        return optimizer

    peer = run(fused_torch)
    peer.add_param_group({"params": [param(3)], "lr": -0.1})
    fused_torch([{"params": [param(3)], "lr": -0.1}])
    assert (params_of(peer)[0] > 1).all()
    with pytest.raises(ValueError, match=r"lr must be .*got -0\.2"):
        run(FusedAdamW)


@pytest.mark.parity(
    "Parameter groups",
    "`add_param_group` in mid-run",
    torch="the new parameters begin at step 0, the others go on; what it does not name comes from the constructor",
    nexus="same",
)
def test_a_group_is_added(backend: str) -> None:
    def run(make: Make) -> Optimizer:
        optimizer = make(make_params([(5,)], torch.float64), lr=0.1, betas=(0.8, 0.9))
        train(optimizer, steps=4)
        optimizer.add_param_group({"params": make_params([(2, 3)], torch.float64), "lr": 0.5})
        train(optimizer, steps=3)
        return optimizer

    first, second = both(run, backend)
    assert_same(first, second)
    assert [int(state_of(second, index)["step"]) for index in range(2)] == [7, 3]
    assert second.param_groups[1]["betas"] == first.param_groups[1]["betas"] == (0.8, 0.9)


@pytest.mark.parity(
    "Parameter groups",
    "a group appended to `param_groups` without `add_param_group`",
    torch="`KeyError` in the next step, for the options that it lacks",
    nexus="taken as `add_param_group` takes it",
    why="some libraries do this",
)
def test_a_group_is_appended(backend: str) -> None:
    peer, *ours = fused_torch([param(3)]), *(FusedAdamW([param(3)], backend=backend) for _ in range(2))
    late = [{"params": [param(2)], "lr": 0.5} for _ in range(3)]
    peer.param_groups.append(late[0])
    with pytest.raises(KeyError, match="betas"):
        train(peer, steps=1)
    train_alike(*ours, steps=2)
    ours[0].add_param_group(late[1])
    ours[1].param_groups.append(late[2])
    train_alike(*ours, steps=3)
    assert_same(*ours)
    assert [int(state_of(ours[1], index)["step"]) for index in range(2)] == [5, 3]


def train_alike(*optimizers: Optimizer, steps: int) -> None:
    for optimizer in optimizers:
        torch.manual_seed(0)
        train(optimizer, steps)


@pytest.mark.parity(
    "Parameter groups",
    "an empty group, beside others",
    torch="is left alone",
    nexus="same",
    also=("test_layouts.py::test_an_empty_group_and_one_without_gradients",),
)
@same_of_both
def test_an_empty_group(make: Make) -> object:
    optimizer = make([{"params": []}, {"params": [param(3)]}, {"params": []}], lr=0.1)
    train(optimizer)
    assert len(optimizer.param_groups) == 3
    return optimizer


@pytest.mark.parity(
    "Parameter groups",
    "`(name, parameter)` pairs, and keys of the user's own",
    torch="`group['param_names']`, and the keys; also in the state dict",
    nexus="same",
    also=("test_torch_cases.py::test_names_come_from_the_state_dict_if_it_has_them",),
)
@same_of_both
def test_names_and_other_keys(make: Make) -> object:
    optimizer = make([{"params": list(nn.Linear(2, 2).named_parameters()), "mine": "x"}])
    for group in (optimizer.param_groups[0], optimizer.state_dict()["param_groups"][0]):
        assert (group["param_names"], group["mine"]) == (["weight", "bias"], "x")
    return optimizer


@pytest.mark.parity(
    "Parameter groups",
    "the keys of a group",
    torch="also `foreach, capturable, differentiable, fused, decoupled_weight_decay`",
    nexus="also `max_grad_norm, lr_scale, lr_schedule, weight_decay_schedule`, and none of those",
    why="they choose among torch's implementations, of which there is none here",
)
def test_the_keys_of_a_group() -> None:
    first, second = both(lambda make: set(make([param(1)]).param_groups[0]))
    assert first - second == {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
    assert second - first == {"max_grad_norm", "lr_scale", "lr_schedule", "weight_decay_schedule"}


# Edits by hand.

Edit = Callable[[Any, nn.Parameter], Any]  # an optimizer of two groups, a new parameter


def first_of(optimizer: Optimizer) -> list[nn.Parameter]:
    found: list[nn.Parameter] = optimizer.param_groups[0]["params"]
    return found


def groups_as_a_tuple(optimizer: Any, new: nn.Parameter) -> None:
    optimizer.param_groups = tuple(optimizer.param_groups)
    first_of(optimizer).append(new)


def the_same_memory(optimizer: Optimizer, new: nn.Parameter) -> None:
    """As weight_norm and Gaussian splatting do: a new parameter over the memory of one that gets no gradients."""
    old = first_of(optimizer)[0]
    old.requires_grad_(False)
    first_of(optimizer).extend([nn.Parameter(old.detach()), new])


EDITS: dict[str, Edit] = {
    "appended": lambda o, new: first_of(o).append(new),
    "replaced": lambda o, new: first_of(o).__setitem__(0, new),
    "a slice": lambda o, new: first_of(o).__setitem__(slice(None), [first_of(o)[1], new]),
    "another list": lambda o, new: o.param_groups[0].update(params=[new, first_of(o)[1]]),
    "a tuple": lambda o, new: o.param_groups[0].update(params=(*first_of(o), new)),
    "reversed": lambda o, new: first_of(o).reverse(),
    "taken out": lambda o, new: first_of(o).pop(0),
    "groups as a tuple": groups_as_a_tuple,
    "a group of a plain dict": lambda o, new: o.param_groups.append({**o.param_groups[0], "params": [new]}),
    "a group taken out": lambda o, new: o.param_groups.pop(),
    "the same memory": the_same_memory,
}


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parity(
    "Parameter groups",
    "edited by hand: parameters appended, also to a group with names, replaced, reordered or taken out, `params` or "
    "`param_groups` as tuples, a parameter over the memory of one without a gradient",
    torch="the next step takes what is there",
    nexus="same",
)
def test_groups_by_hand(edit: Edit, named: bool, backend: str) -> None:
    def run(make: Make) -> tuple[Optimizer, list[nn.Parameter]]:
        own: list[Any] = make_params([(3,), (2, 2), (4,)], torch.float64)
        given = [(f"w{i}", each) for i, each in enumerate(own)] if named else own
        optimizer = make([{"params": given[:2]}, {"params": given[2:], "lr": 0.2}], lr=0.1)
        train(optimizer, 2)
        own.append(param(5))
        edit(optimizer, own[3])
        for _ in range(3):
            optimizer.param_groups[0]["lr"] = numpy.float64(float(optimizer.param_groups[0]["lr"]) * 0.9)
            everything = list(dict.fromkeys([*own, *params_of(optimizer)]))
            set_grads(everything, [grad if p.requires_grad else None for p, grad in with_grads(everything)])
            optimizer.step()
        for gone in set(optimizer.state) - set(params_of(optimizer)):
            del optimizer.state[gone]
        optimizer.state_dict()
        return optimizer, everything

    assert_found_the_same(*both(run, backend))  # also parameters that are in no group


def with_grads(params: list[nn.Parameter]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    return list(zip(params, make_grads(params), strict=True))


@pytest.mark.parity(
    "State dicts",
    "the same group twice in `param_groups`",
    torch="a parameter has the number of its first place; a step updates it twice",
    nexus="the same number; a step is `ValueError`",
    why="an update that is made twice is never what was meant",
)
def test_the_same_group_twice(backend: str) -> None:
    def run(make: Make) -> tuple[Optimizer, Any]:
        optimizer = make([{"params": [param(2), param(3)]}, {"params": [param(4)]}], lr=0.1)
        train(optimizer, 1)
        optimizer.param_groups.extend(optimizer.param_groups)
        saved = optimizer.state_dict()
        return optimizer, ([group["params"] for group in saved["param_groups"]], sorted(saved["state"]))

    (peer, theirs), (ours, numbers) = both(run, backend)
    assert theirs == numbers == ([[0, 1], [2], [0, 1], [2]], [0, 1, 2])
    train(peer, 1)
    assert int(state_of(peer)["step"]) == 3
    with pytest.raises(ValueError, match=r"parameter 0 of group 2 is also parameter 0 of group 0.*updated twice"):
        train(ours, 1)
    del ours.param_groups[2:]
    train(ours, 1)
    assert int(state_of(ours)["step"]) == 2
