"""Parameter groups: rows of docs/parity.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from references import make_grads, make_params
from side_by_side import (
    Make,
    assert_same,
    both,
    fails,
    fused_torch,
    outcomes,
    param,
    params_of,
    same_on_every_backend,
    state_of,
    train,
)
from torch import nn
from torch.optim import Optimizer

from nexus.optim import FusedAdamW

THEME = "Parameter groups"


@pytest.mark.parity("each group has options of its own", torch="yes")
@pytest.mark.parity(
    "`add_param_group` in mid-run",
    torch="the new parameters begin at step 0, the others go on; what it does not name comes from the constructor",
)
@pytest.mark.parity("an empty group, beside others", torch="is left alone")
@same_on_every_backend
def test_options_by_group(make: Make) -> object:
    options = [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"eps": 1e-2, "weight_decay": 0.0, "amsgrad": True},
        {"maximize": True},
        {"lr": 0.5},
    ]
    groups = [{"params": make_params([(5,)], torch.float64), **each} for each in options]
    optimizer = make([{"params": []}, *groups[:3], {"params": []}], lr=0.01, betas=(0.8, 0.9))
    train(optimizer, steps=10)
    optimizer.add_param_group(groups[3])
    train(optimizer, steps=3)
    assert [int(state_of(optimizer, index)["step"]) for index in range(4)] == [13, 13, 13, 3]
    kept = [(group["betas"], group["lr"]) for group in optimizer.param_groups]
    assert kept[0] == kept[4] == ((0.8, 0.9), 0.01)
    assert kept[5] == ((0.8, 0.9), 0.5)
    return optimizer


@pytest.mark.parity(
    "an option of a group, or one that is changed between steps, out of range",
    torch="taken: only the constructor's own arguments are checked. A negative rate climbs",
    nexus="`ValueError`, by the constructor, `add_param_group` or the next step; nothing is changed",
    why="an error belongs where the mistake is",
    also=(
        "test_arguments.py::test_a_bad_option_of_a_group",
        "test_rates_torch.py::test_a_bad_change_is_refused_and_changes_nothing",
    ),
)
@pytest.mark.parametrize("when", ["constructor", "add_param_group", "step"])
@outcomes(torch=True, nexus=fails(ValueError, r"lr must be .*got -0\.2"))
def test_a_bad_option_of_a_group_or_in_mid_run(make: Make, when: str) -> object:
    bad = {"params": [param(3)], "lr": -0.2}
    optimizer = make([bad if when == "constructor" else {"params": [param(3)]}])
    if when == "add_param_group":
        optimizer.add_param_group(bad)
    if when == "step":
        optimizer.param_groups[0]["lr"] = -0.2
    train(optimizer, steps=1)
    return bool((params_of(optimizer)[-1] > 1).all())


@pytest.mark.parity(
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
    for optimizer in ours:
        torch.manual_seed(0)
        train(optimizer, steps=2)
        add = optimizer.add_param_group if optimizer is ours[0] else optimizer.param_groups.append
        add(late.pop())
        train(optimizer, steps=3)
    assert_same(*ours)
    assert [int(state_of(ours[1], index)["step"]) for index in range(2)] == [5, 3]


Edit = Callable[[Any, nn.Parameter], Any]  # an optimizer of two groups, a new parameter


def first_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return optimizer.param_groups[0]["params"]


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
    "edited by hand: parameters appended, also to a group with names, replaced, reordered or taken out, `params` or "
    "`param_groups` as tuples, a parameter over the memory of one without a gradient",
    torch="the next step takes what is there",
)
@same_on_every_backend
def test_groups_by_hand(make: Make, edit: Edit, named: bool) -> object:
    own: list[Any] = make_params([(3,), (2, 2), (4,)], torch.float64)
    given = [(f"w{i}", each) for i, each in enumerate(own)] if named else own
    optimizer = make([{"params": given[:2]}, {"params": given[2:], "lr": 0.2}], lr=0.1)
    train(optimizer, 2)
    own.append(param(5))
    edit(optimizer, own[3])
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = numpy.float64(float(optimizer.param_groups[0]["lr"]) * 0.9)
        everything = list(dict.fromkeys([*own, *params_of(optimizer)]))
        for each, grad in zip(everything, make_grads(everything), strict=True):
            each.grad = grad if each.requires_grad else None
        optimizer.step()
    for gone in set(optimizer.state) - set(params_of(optimizer)):
        del optimizer.state[gone]
    optimizer.state_dict()
    return optimizer, everything  # also parameters that are in no group


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
