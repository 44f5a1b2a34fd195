"""Parameter groups: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import make_params
from side_by_side import Make, assert_same, both, fused_torch, of_this_torch, param, params_of, state_of, train

from nexus.optim import FusedAdamW

pytestmark = of_this_torch


@pytest.mark.parity(
    "Parameter groups",
    "each group has options of its own",
    torch="yes",
    nexus="same",
    also=("test_optimizer_behaviour.py::test_every_group_has_options_of_its_own",),
)
def test_options_by_group() -> None:
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"eps": 1e-2, "weight_decay": 0.0, "amsgrad": True},
        {"maximize": True},
    ]

    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make([{"params": make_params([(5,)], torch.float64), **each} for each in options], lr=0.01)
        train(optimizer, steps=10)
        return optimizer

    first, second = both(run)
    assert_same(first, second)


@pytest.mark.parity(
    "Parameter groups",
    "an option of a group, or one that is changed between steps, out of range",
    torch="taken: only the constructor's own arguments are checked. A negative rate climbs",
    nexus="`ValueError`, by the constructor, `add_param_group` or the next step; nothing is changed",
    why="an error belongs where the mistake is",
    also=(
        "test_optimizer_inputs.py::test_a_bad_option_of_a_group",
        "test_rates_torch.py::test_a_bad_change_is_refused_and_changes_nothing",
    ),
)
def test_a_bad_option_of_a_group_or_in_mid_run() -> None:
    peer = fused_torch([{"params": [param(3)], "lr": -0.1}])
    peer.add_param_group({"params": [param(3)], "lr": -0.1})
    peer.param_groups[1]["lr"] = -0.2
    train(peer, steps=1)
    assert all((each > 1).all() for each in params_of(peer))
    with pytest.raises(ValueError, match=r"lr must be .*got -0\.1"):
        FusedAdamW([{"params": [param(3)], "lr": -0.1}])
    optimizer = FusedAdamW([param(3)])
    with pytest.raises(ValueError, match=r"lr must be .*got -0\.1"):
        optimizer.add_param_group({"params": [param(3)], "lr": -0.1})
    optimizer.param_groups[0]["lr"] = -0.2
    with pytest.raises(ValueError, match=r"lr must be .*got -0\.2"):
        train(optimizer, steps=1)
    assert params_of(optimizer)[0].tolist() == [1.0] * 3


@pytest.mark.parity(
    "Parameter groups",
    "`add_param_group` in mid-run",
    torch="the new parameters begin at step 0, the others go on; what it does not name comes from the constructor",
    nexus="same",
    also=("test_optimizer_behaviour.py::test_a_group_is_added_while_training",),
)
def test_a_group_is_added() -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make(make_params([(5,)], torch.float64), lr=0.1, betas=(0.8, 0.9))
        train(optimizer, steps=4)
        optimizer.add_param_group({"params": make_params([(2, 3)], torch.float64), "lr": 0.5})
        train(optimizer, steps=3)
        return optimizer

    first, second = both(run)
    assert_same(first, second)
    assert [int(state_of(second, index)["step"]) for index in range(2)] == [7, 3]
    assert second.param_groups[1]["betas"] == first.param_groups[1]["betas"] == (0.8, 0.9)


@pytest.mark.parity(
    "Parameter groups",
    "a group appended to `param_groups` without `add_param_group`",
    torch="`KeyError` in the next step, for the options that it lacks",
    nexus="taken as `add_param_group` takes it",
    why="some libraries do this",
    also=("test_optimizer_behaviour.py::test_a_group_is_added_while_training",),
)
def test_a_group_is_appended() -> None:
    peer, added, appended = fused_torch([param(3)]), FusedAdamW([param(3)]), FusedAdamW([param(3)])
    added.add_param_group({"params": [param(2)], "lr": 0.5})
    for optimizer in (peer, appended):
        optimizer.param_groups.append({"params": [param(2)], "lr": 0.5})
    with pytest.raises(KeyError, match="betas"):
        train(peer, steps=1)
    for optimizer in (added, appended):
        torch.manual_seed(0)
        train(optimizer)
    assert_same(added, appended)
    assert int(state_of(appended, 1)["step"]) == 3


@pytest.mark.parity(
    "Parameter groups",
    "an empty group, beside others",
    torch="is left alone",
    nexus="same",
    also=("test_tensor_list.py::test_an_empty_group_and_one_without_gradients",),
)
def test_an_empty_group() -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make([{"params": []}, {"params": [param(3)]}, {"params": []}], lr=0.1)
        train(optimizer)
        return optimizer

    first, second = both(run)
    assert len(second.param_groups) == len(first.param_groups) == 3
    assert_same(first, second)


@pytest.mark.parity(
    "Parameter groups",
    "`(name, parameter)` pairs, and keys of the user's own",
    torch="`group['param_names']`, and the keys; also in the state dict",
    nexus="same",
    also=("test_optimizer_behaviour.py::test_named_parameters",),
)
def test_names_and_other_keys() -> None:
    def seen(make: Make) -> list[Any]:
        groups = [{"params": list(torch.nn.Linear(2, 2).named_parameters()), "mine": "x"}]
        optimizer = make(groups)
        kept = [optimizer.param_groups[0], optimizer.state_dict()["param_groups"][0]]
        return [[group["param_names"], group["mine"]] for group in kept]

    first, second = both(seen)
    assert first == second == [[["weight", "bias"], "x"]] * 2


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
