"""State dicts of other optimizers and older codes, and what wrappers and schedulers keep in one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import copies, make_grads, make_params, set_grads
from side_by_side import (
    Make,
    assert_same,
    both,
    fused_torch,
    of_this_torch,
    param,
    params_of,
    same_of_both,
    state_of,
    train,
    train_alike,
)
from torch.optim import Optimizer

from nexus.optim import FusedAdamW

SHAPES = [(3, 4), (5,), (2,)]
DTYPE = torch.float64


def saved_by_torch() -> tuple[Optimizer, dict[str, Any]]:
    """A run of torch's after a few steps, the last parameter without a gradient, and its state dict."""
    params = make_params(SHAPES, DTYPE)
    optimizer = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    for _ in range(4):
        set_grads(params[:2], make_grads(params[:2]))
        optimizer.step()
    return optimizer, copy.deepcopy(optimizer.state_dict())


def count_in_the_group(as_count: Callable[[int], Any]) -> Callable[[dict[str, Any]], None]:
    """apex, TransformerEngine, DeepSpeed and old codes."""

    def change(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            group.update(step=as_count(4), bias_correction=True)
            for name in ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"):
                del group[name]
            del group["decoupled_weight_decay"]
        for state in saved["state"].values():
            del state["step"]

    return change


def bitsandbytes_32_bits(saved: dict[str, Any]) -> None:
    for state in saved["state"].values():
        state.update(step=int(state["step"]), state1=state.pop("exp_avg"), state2=state.pop("exp_avg_sq"))


def bitsandbytes_of_today(saved: dict[str, Any]) -> None:
    """As release 0.50 saves it, so that FSDP casts no moment."""
    bitsandbytes_32_bits(saved)
    for state in saved["state"].values():
        state["__bnb_optimizer_quant_state__"] = {name: state.pop(name) for name in ("state1", "state2")}


def counts(changed: Callable[[torch.Tensor], Any]) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for state in saved["state"].values():
            state["step"] = changed(state["step"])

    return change


FOREIGN: dict[str, Callable[[dict[str, Any]], None]] = {
    "a count in the group": count_in_the_group(int),
    "a count in the group, a tensor": count_in_the_group(lambda n: torch.tensor([n], dtype=torch.int32)),
    "bitsandbytes in 32 bits": bitsandbytes_32_bits,
    "bitsandbytes in 32 bits, moments in a dict of their own": bitsandbytes_of_today,
    "counts that are averages": counts(lambda count: (count + 4.0) / 2),
    "counts that are numbers, as older versions of torch have them": counts(float),
    "empty entries": lambda saved: saved["state"].update({2: {}}),
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_the_same_numbers_go_on(change: Callable[[dict[str, Any]], None], backend: str) -> None:
    peer, saved = saved_by_torch()
    change(saved)
    kept = copy.deepcopy(saved)
    own = copies(params_of(peer))
    ours = FusedAdamW([{"params": own[:1]}, {"params": own[1:]}], backend=backend)
    ours.load_state_dict(saved)
    assert [group.get("step") for group in ours.param_groups] == [None, None]
    train_alike(peer, ours)
    assert_same(peer, ours)
    assert [sorted(state) for state in saved["state"].values()] == [sorted(state) for state in kept["state"].values()]


@pytest.mark.parity(
    "State dicts",
    "a state dict of `torch.optim.Adam` without weight decay",
    torch="loaded: its moments are AdamW's",
    nexus="same; with weight decay, `ValueError`",
    why="its moments are then of other gradients",
    also=("test_checkpoint_foreign.py::test_the_same_numbers_go_on",),
)
@of_this_torch
def test_adams_moments_without_weight_decay() -> None:
    def run(make: Make, decay: float = 0.0) -> Optimizer:
        optimizer = make([param(3)], lr=0.1)
        adam = torch.optim.Adam([param(3)], lr=0.2, weight_decay=decay)
        train(adam)
        optimizer.load_state_dict(adam.state_dict())
        assert optimizer.param_groups[0]["weight_decay"] == decay
        train(optimizer)
        return optimizer

    assert_same(*both(run))
    run(fused_torch, 0.5)
    with pytest.raises(ValueError, match=r"is not AdamW's.*those of an Adam do if it had no weight decay"):
        run(FusedAdamW, 0.5)


# What a load brings, and what it leaves.


def with_extras(make: Make) -> Optimizer:
    """State and groups with keys of a wrapper's and of a scheduler's."""
    optimizer = make([param(3), param(4)], lr=0.1)
    train(optimizer)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=5)
    state_of(optimizer)["slow"] = torch.full((3,), 2.0, dtype=DTYPE)
    state_of(optimizer)["info"] = {"seen": [torch.ones(2, dtype=DTYPE)], "name": "w"}
    optimizer.state["wrapper"] = {"calls": 3}
    optimizer.state["epoch"] = 7
    return optimizer


@pytest.mark.parity(
    "State dicts",
    "what a state dict does not have: keys of a wrapper's in `state`, `initial_lr` and `max_lr` in groups",
    torch="is gone after a load",
    nexus="same",
    also=("test_checkpoint_foreign.py::test_what_a_wrapper_has_saved_comes_back",),
)
@of_this_torch
@same_of_both
def test_what_was_not_saved_is_gone(make: Make) -> object:
    plain = make([param(3), param(4)], lr=0.1)
    train(plain)
    saved = copy.deepcopy(plain.state_dict())
    saved["state"].pop(1)
    optimizer = with_extras(make)
    optimizer.load_state_dict(saved)
    assert [sorted(state) for state in optimizer.state.values()] == [["exp_avg", "exp_avg_sq", "step"]]
    schedulers = {"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
    assert schedulers.isdisjoint(optimizer.param_groups[0])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    train(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    return optimizer


def test_what_a_wrapper_has_saved_comes_back(backend: str) -> None:
    first = with_extras(functools.partial(FusedAdamW, backend=backend))
    first.param_groups[0]["note"] = "mine"
    saved = copy.deepcopy(first.state_dict())
    saved["state"]["wrapper"]["step"] = None
    saved["state"][0]["exp_avg"].requires_grad_()
    optimizer = FusedAdamW([param(3), param(4)], backend=backend)
    optimizer.state["gone"] = 1
    optimizer.load_state_dict(saved)
    state = state_of(optimizer)
    assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"].detach())
    assert not state["exp_avg"].requires_grad
    saved["state"][0]["slow"].zero_()
    assert state["info"]["name"] == "w"
    assert state["info"]["seen"][0].device == params_of(optimizer)[0].device
    assert (optimizer.state["wrapper"], optimizer.state["epoch"]) == ({"calls": 3, "step": None}, 7)
    assert "gone" not in optimizer.state
    group = optimizer.param_groups[0]
    assert (group["initial_lr"], group["max_lr"], group["note"]) == (0.02, 0.5, "mine")
    train(optimizer)
    assert state_of(optimizer)["slow"].tolist() == [2.0] * 3
    optimizer.load_state_dict(optimizer.state_dict())  # its own


@pytest.mark.parity(
    "State dicts",
    "a state dict that was taken, after a later load",
    torch="keeps its values",
    nexus="same, where no graph has captured a step",
    why="what a graph points to is written in place",
    also=("test_checkpoint.py::test_moments_that_a_graph_points_to_are_loaded_in_place",),
)
@of_this_torch
@same_of_both
def test_a_state_dict_that_was_taken_keeps_its_values(make: Make) -> object:
    """Two optimizers that exchange their states, as PyTorch's test of ZeroRedundancyOptimizer does."""
    first, second = (make([param(3)], lr=rate) for rate in (0.1, 0.2))
    train(first, 2)
    train(second, 3)
    of_first, of_second = first.state_dict(), second.state_dict()
    values = copy.deepcopy(of_first)
    first.load_state_dict(of_second)
    torch.testing.assert_close(of_first["state"], values["state"], rtol=0, atol=0)
    second.load_state_dict(of_first)
    train(first)
    train(second)
    return [first, second]


@pytest.mark.parity(
    "State dicts",
    "writing through a state dict: to its tensors, and into its entries (`horovod.broadcast_optimizer_state`)",
    torch="reaches the optimizer",
    nexus="same",
)
@of_this_torch
@same_of_both
def test_a_state_dict_is_the_live_state(make: Make) -> object:
    optimizer = make([param(3), param(4)], lr=0.1)
    train(optimizer)
    saved = optimizer.state_dict()
    saved["state"][0]["step"].fill_(100.0)
    saved["state"][0]["exp_avg"].zero_()
    saved["state"][1]["exp_avg_sq"] = torch.full((4,), 0.5, dtype=DTYPE)
    train(optimizer)
    assert int(state_of(optimizer)["step"]) == 103
    return optimizer
