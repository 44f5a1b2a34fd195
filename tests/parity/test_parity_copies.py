"""What the user adds to an optimizer, and copies of it: rows of docs/parity.md."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import same_bits, snapshot
from side_by_side import Make, assert_same, both, of_this_torch, params_of, state_of, train
from test_parity_checkpoints import kept, trained

pytestmark = of_this_torch


def pickled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return pickle.loads(pickle.dumps(optimizer))


@pytest.mark.parity(
    "State dicts",
    "entries of the user's own, in a group and in a parameter's state",
    torch="are saved and loaded",
    nexus="same",
    also=("test_checkpoint_foreign.py::test_what_a_wrapper_has_saved_comes_back",),
)
def test_entries_of_the_users_own() -> None:
    def loaded(make: Make) -> tuple[Any, Any]:
        optimizer = trained(make)
        optimizer.param_groups[0]["mine"] = "x"
        state_of(optimizer)["mine"] = 7
        other = trained(make, steps=0)
        other.load_state_dict(kept(optimizer))
        train(other)
        return other.param_groups[0]["mine"], state_of(other)["mine"]

    assert both(loaded) == (("x", 7), ("x", 7))


@pytest.mark.parity(
    "State dicts",
    "hooks before and after `state_dict` and `load_state_dict`",
    torch="run in the order in which they were registered; what one after `state_dict` returns is the dict",
    nexus="same",
    also=(
        "test_torch_cases.py::test_state_dict_hooks_run_in_order",
        "test_torch_cases.py::test_load_state_dict_hooks_run_in_order",
    ),
)
def test_hooks_of_state_dicts() -> None:
    def calls(make: Make) -> list[str]:
        optimizer = trained(make)
        seen: list[str] = []
        for n in (1, 2):
            optimizer.register_state_dict_pre_hook(lambda each, n=n: seen.append(f"before saving {n}"))
            optimizer.register_load_state_dict_pre_hook(lambda each, saved, n=n: seen.append(f"before loading {n}"))
            optimizer.register_load_state_dict_post_hook(lambda each, n=n: seen.append(f"after loading {n}"))
        optimizer.register_state_dict_post_hook(lambda each, saved: {**saved, "mine": 1})
        saved = optimizer.state_dict()
        assert saved["mine"] == 1
        optimizer.load_state_dict(saved)
        return seen

    first, second = both(calls)
    assert first == second
    assert second == [f"{when} {n}" for when in ("before saving", "before loading", "after loading") for n in (1, 2)]


@pytest.mark.parity(
    "Copies",
    "`copy.deepcopy` and `pickle`",
    torch="parameters and state are copied, and the copy goes on to the same bits",
    nexus="same",
    also=(
        "test_checkpoint.py::test_a_copied_optimizer_goes_on_the_same",
        "test_torch_cases.py::test_copies_have_all_public_attributes_and_go_on_the_same",
    ),
)
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_go_on_the_same(copied: Callable[[Any], Any]) -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = trained(make, amsgrad=True)
        other = copied(optimizer)
        assert type(other) is type(optimizer)
        assert params_of(other)[0] is not params_of(optimizer)[0]
        for each in (optimizer, other):
            torch.manual_seed(1)
            train(each)
        assert same_bits(snapshot(optimizer), snapshot(other))
        return other

    assert_same(*both(run))
