"""What the user adds to an optimizer, and copies of it: rows of docs/parity.md."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import same_bits, snapshot
from side_by_side import Make, of_this_torch, params_of, same_of_both, state_of, train
from test_parity_checkpoints import kept, trained

pytestmark = of_this_torch


@pytest.mark.parity(
    "State dicts",
    "entries of the user's own, in a group and in a parameter's state",
    torch="are saved and loaded",
    nexus="same",
    also=("test_checkpoint_foreign.py::test_what_a_wrapper_has_saved_comes_back",),
)
@same_of_both
def test_entries_of_the_users_own(make: Make) -> object:
    optimizer = trained(make)
    optimizer.param_groups[0]["mine"] = "x"
    state_of(optimizer)["mine"] = 7
    other = trained(make, steps=0)
    other.load_state_dict(kept(optimizer))
    train(other)
    assert (other.param_groups[0]["mine"], state_of(other)["mine"]) == ("x", 7)
    del state_of(other)["mine"]
    return other


@pytest.mark.parity(
    "State dicts",
    "hooks before and after `state_dict` and `load_state_dict`",
    torch="run in the order in which they were registered; what one after `state_dict` returns is the dict",
    nexus="same",
)
@same_of_both
def test_hooks_of_state_dicts(make: Make) -> list[str]:
    optimizer = trained(make)
    seen: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda *_: seen.append(name)

    def other_rate(each: Any, given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "param_groups": [{**group, "lr": 0.7} for group in given["param_groups"]]}

    when = {
        "before saving": optimizer.register_state_dict_pre_hook,
        "before loading": optimizer.register_load_state_dict_pre_hook,
        "after loading": optimizer.register_load_state_dict_post_hook,
    }
    for name, register in when.items():
        register(hook(f"{name} 2"))
        register(hook(f"{name} 3"))
        register(hook(f"{name} 1"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda each, saved: {**saved, "mine": 1})
    optimizer.register_load_state_dict_pre_hook(other_rate)
    saved = optimizer.state_dict()
    assert saved["mine"] == 1
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.7
    assert seen == [f"{name} {n}" for name in when for n in (1, 2, 3)]
    return seen


@pytest.mark.parity(
    "Copies",
    "`copy.deepcopy` and `pickle`",
    torch="parameters and state are copied, and the copy goes on to the same bits",
    nexus="same",
    also=("test_checkpoint.py::test_a_copied_optimizer_goes_on_the_same",),
)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))], ids=["deepcopy", "pickle"]
)
@same_of_both
def test_copies_go_on_the_same(make: Make, copied: Callable[[Any], Any]) -> object:
    optimizer = trained(make, amsgrad=True)
    other = copied(optimizer)
    assert type(other) is type(optimizer)
    assert [name for name in vars(other) if name[0] != "_"] == [name for name in vars(optimizer) if name[0] != "_"]
    assert params_of(other)[0] is not params_of(optimizer)[0]
    for each in (optimizer, other):
        torch.manual_seed(1)
        train(each)
    assert same_bits(snapshot(optimizer), snapshot(other))
    return other
