"""State dicts and copies: rows of docs/parity.md."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import make_params, same_bits, snapshot
from side_by_side import (
    Make,
    assert_outcomes,
    fails,
    fused_torch,
    outcomes,
    param,
    params_of,
    same_of_both,
    same_on_every_backend,
    state_of,
    train,
)
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from nexus.optim import FusedAdamW

THEME = "State dicts"


def trained(make: Make, steps: int = 3, dtype: torch.dtype = torch.float64, **options: Any) -> Optimizer:
    optimizer = make(make_params([(5,), (2, 3)], dtype), **{"lr": 0.1, **options})
    train(optimizer, steps)
    return optimizer


def kept(optimizer: Optimizer) -> dict[str, Any]:
    """Its state dict, as one of a file."""
    return copy.deepcopy(optimizer.state_dict())


def loaded(make: Make, saved: dict[str, Any], **options: Any) -> Optimizer:
    """An optimizer that has trained, and then loads."""
    optimizer = trained(make, **options)
    optimizer.load_state_dict(saved)
    return optimizer


NAMES = {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parity(
    "what a state dict holds",
    torch="`state` by the number of the parameter, `param_groups` with the numbers; plain types and tensors, so that "
    "`torch.load(weights_only=True)` reads it",
    nexus="the same, and `nexus_format`, a number",
    why="a checkpoint of a later release is refused and not misread",
    also=("test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",),
)
@pytest.mark.parity(
    "dtype of `step` in a state dict",
    torch="float32",
    nexus="float64",
    why="floats, as torch writes them, and exact up to 2**53",
    also=("test_counters.py::test_counts_go_on_beyond_what_float32_holds",),
)
@outcomes(
    torch=(["state", "param_groups"], {0: NAMES, 1: NAMES}, [0, 1], torch.float32, 3),
    nexus=(["state", "param_groups", "nexus_format"], {0: NAMES, 1: NAMES}, [0, 1], torch.float64, 3),
)
def test_what_a_state_dict_holds(make: Make) -> object:
    saved = trained(make).state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    torch.testing.assert_close(read["state"], saved["state"], rtol=0, atol=0)
    assert read["param_groups"] == saved["param_groups"]
    names = {key: set(state) for key, state in saved["state"].items()}
    step = saved["state"][0]["step"]
    return list(saved), names, saved["param_groups"][0]["params"], step.dtype, step.item()


@pytest.mark.parity(
    "options, on loading: `lr`, `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize`",
    torch="come from the state dict; where an older one lacks the last two, they are `False`",
    also=("test_checkpoint_foreign.py::test_the_same_numbers_go_on",),
)
@pytest.mark.parametrize("older", [False, True])
@same_of_both
def test_options_come_from_the_state_dict(make: Make, older: bool) -> object:
    options = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2}
    options |= {"amsgrad": not older, "maximize": not older}
    saved = kept(trained(make, **options))
    if older:
        del saved["param_groups"][0]["amsgrad"], saved["param_groups"][0]["maximize"]
    group = loaded(make, saved, amsgrad=True, maximize=True).param_groups[0]
    assert {name: group[name] for name in options} == options
    return options


@pytest.mark.parity(
    "`foreach`, `fused` and `capturable`, on loading",
    torch="overwritten: after a checkpoint of `foreach=True`, an optimizer made with `fused=True` is no longer fused",
    nexus="not there to be overwritten; the backend stays",
    why="which kernels run is for this machine to say, and not for the one that saved",
    also=("test_pitfalls.py::test_a_load_takes_over_no_implementation",),
)
@outcomes(torch=([None, True, True], None), nexus=([], "native"))
def test_a_load_takes_over_no_implementation(make: Make) -> object:
    saved = kept(trained(torch.optim.AdamW, foreach=True))
    saved["param_groups"][0]["capturable"] = True  # as of a run on a GPU
    optimizer = loaded(make, saved)
    group = optimizer.param_groups[0]
    found = [group[name] for name in ("fused", "foreach", "capturable") if name in group]
    return found, getattr(optimizer, "backend", None)


@pytest.mark.parity(
    "a tensor `lr`, on loading",
    torch="replaced by what was saved, a tensor or a float",
    nexus="keeps its tensor, into which the saved rate is written",
    why="a graph or a scheduler may hold it",
    also=("test_checkpoint.py::test_counters_and_rates_are_loaded_in_place",),
)
@pytest.mark.parametrize("saved_as", [torch.tensor, float])
@outcomes(torch=(False, 0.5), nexus=(True, 0.5))
def test_a_tensor_rate_on_loading(make: Make, saved_as: Callable[[float], Any]) -> object:
    saved, rate = kept(trained(make, lr=saved_as(0.5))), torch.tensor(0.125)
    now = loaded(make, saved, lr=rate).param_groups[0]["lr"]
    return now is rate, float(now)


@pytest.mark.parity(
    "a tensor `lr`, on saving",
    torch="the state dict holds the very tensor, and changes with it",
    nexus="the state dict holds a float",
    why="a checkpoint in memory is that of its moment, and can be written as JSON",
)
@outcomes(torch=(torch.Tensor, 0.25), nexus=(float, 0.5))
def test_a_tensor_rate_on_saving(make: Make) -> object:
    rate = torch.tensor(0.5)
    saved = trained(make, lr=rate).state_dict()["param_groups"][0]["lr"]
    rate.fill_(0.25)
    return type(saved), float(saved)


@pytest.mark.parity(
    "moments and counts of an optimizer that has some, on loading",
    torch="replaced; where dtypes agree, by the very tensors of the dict, which the next step then changes",
    nexus="replaced, by copies; written in place where a step in a graph points to them",
    why="a dict may be loaded twice",
    also=(
        "test_checkpoint.py::test_moments_that_a_graph_points_to_are_loaded_in_place",
        "test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",
    ),
)
@outcomes(torch=(False, False), nexus=(False, True))
def test_moments_on_loading(make: Make) -> object:
    saved, optimizer = kept(trained(make)), trained(make)
    before, there = copy.deepcopy(saved), state_of(optimizer)["exp_avg"]
    optimizer.load_state_dict(saved)
    train(optimizer)
    unchanged = same_bits(*(list(each["state"][0].values()) for each in (saved, before)))
    assert saved["param_groups"] == before["param_groups"]
    return state_of(optimizer)["exp_avg"] is there, unchanged


@pytest.mark.parity(
    "float32 moments for bfloat16 parameters, on loading",
    torch="rounded to bfloat16",
    nexus="stay float32, bit for bit",
    why="see the rows about bfloat16",
    also=("test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",),
)
@outcomes(torch=(torch.bfloat16, False), nexus=(torch.float32, True))
def test_float32_moments_of_bfloat16_parameters(make: Make) -> object:
    saved = kept(trained(FusedAdamW, dtype=torch.float32))
    moment = loaded(make, copy.deepcopy(saved), dtype=torch.bfloat16).state_dict()["state"][0]["exp_avg"]
    return moment.dtype, same_bits([moment], [saved["state"][0]["exp_avg"]])


@pytest.mark.parity(
    "a state dict with another number of groups, or of parameters in a group",
    torch="`ValueError`",
    also=("test_checkpoint_errors.py::test_a_dict_that_does_not_fit_is_named_and_changes_nothing",),
)
@pytest.mark.parametrize(
    ("shapes", "torchs", "ours"),
    [
        ([[5], [6]], "a different number of parameter groups", "has 1 parameter groups, this optimizer 2"),
        ([[5]], "doesn't match the size of optimizer's group", "has 2 parameters, that of this optimizer 1"),
    ],
)
def test_groups_that_do_not_fit(shapes: list[list[int]], torchs: str, ours: str) -> None:
    def load(make: Make) -> None:
        make([{"params": [param(*shape)]} for shape in shapes]).load_state_dict(kept(trained(make)))

    assert_outcomes(load, fails(ValueError, torchs), fails(ValueError, ours))


@pytest.mark.parity(
    "moments of another shape than the parameter's",
    torch="loaded, and used by the next steps without an error",
    nexus="`ValueError` that names the entry; nothing is changed",
    why="everything is checked before anything is written",
    also=("test_checkpoint_errors.py::test_a_dict_that_does_not_fit_is_named_and_changes_nothing",),
)
@outcomes(torch=(7,), nexus=fails(ValueError, r"state\[1\] of the loaded .*exp_avg must be of shape \(2, 3\)"))
def test_moments_that_do_not_fit(make: Make) -> object:
    saved = kept(trained(make))
    saved["state"][1]["exp_avg"] = torch.zeros(7, dtype=torch.float64)
    optimizer = loaded(make, saved)
    train(optimizer)
    return state_of(optimizer, 1)["exp_avg"].shape


@pytest.mark.parity(
    "the state dict of another optimizer: `SGD`, `NAdam`",
    torch="NAdam's is loaded, and its moments are used; SGD's is `KeyError: 'step'`, after its groups are loaded",
    nexus="`ValueError` that says so",
    why="an error belongs where the mistake is",
    also=("test_checkpoint_errors.py::test_another_optimizers_state_is_refused",),
)
def test_another_optimizers_state() -> None:
    sgd, nadam = kept(trained(torch.optim.SGD, momentum=0.9)), kept(trained(torch.optim.NAdam))
    peer = loaded(fused_torch, nadam)
    train(peer)
    assert int(state_of(peer)["step"]) == 6
    with pytest.raises(KeyError, match="step"):
        peer.load_state_dict(sgd)
    assert "momentum" in peer.param_groups[0]
    for saved in (sgd, nadam):
        with pytest.raises(ValueError, match="not AdamW's"):
            loaded(FusedAdamW, saved)


@pytest.mark.parity(
    "a load that fails",
    torch="has replaced groups and moments before the error comes",
    nexus="leaves all as it was",
    why="everything is checked before anything is written",
    also=("test_checkpoint_errors.py::test_a_dict_that_does_not_fit_is_named_and_changes_nothing",),
)
@outcomes(torch=(0.5, False), nexus=(0.1, True))
def test_a_load_that_fails(make: Make) -> object:
    optimizer, saved = trained(make), kept(trained(make, lr=0.5))
    before = snapshot(optimizer)
    del saved["state"][1]["step"]
    with pytest.raises((KeyError, ValueError), match="step"):
        optimizer.load_state_dict(saved)
    return optimizer.param_groups[0]["lr"], same_bits(before, snapshot(optimizer))


@pytest.mark.parity(
    "a state dict without state, on an optimizer that has some",
    torch="the state is gone; moments and counts begin anew",
)
@same_on_every_backend
def test_a_state_dict_without_state(make: Make) -> object:
    optimizer = loaded(make, kept(trained(make, steps=0)))
    assert not optimizer.state
    train(optimizer)
    assert int(state_of(optimizer)["step"]) == 3
    return optimizer


@pytest.mark.parity(
    "entries of the user's own, in a group and in a parameter's state",
    torch="are saved and loaded",
    also=("test_checkpoint_foreign.py::test_what_a_wrapper_has_saved_comes_back",),
)
@pytest.mark.parity(
    "Parameter groups",
    "`(name, parameter)` pairs, and keys of the user's own",
    torch="`group['param_names']`, and the keys; also in the state dict",
    also=("test_torch_cases.py::test_names_come_from_the_state_dict_if_it_has_them",),
)
@same_of_both
def test_names_and_entries_of_the_users_own(make: Make) -> object:
    modules = [torch.nn.Linear(2, 2, dtype=torch.float64) for _ in range(2)]
    first, other = (make([{"params": list(each.named_parameters()), "mine": "x"}]) for each in modules)
    train(first)
    assert first.param_groups[0]["mine"] == "x"
    first.param_groups[0]["mine"] = "y"
    state_of(first)["mine"] = 7
    other.load_state_dict(kept(first))
    train(other)
    for group in (first.state_dict()["param_groups"][0], other.param_groups[0]):
        assert (group["param_names"], group["mine"]) == (["weight", "bias"], "y")
    assert state_of(other).pop("mine") == 7
    return other


@pytest.mark.parity(
    "hooks before and after `state_dict` and `load_state_dict`",
    torch="run in the order in which they were registered; what one after `state_dict` returns is the dict",
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
        for number in (2, 3, 1):
            register(hook(f"{name} {number}"), prepend=number == 1)
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


@pytest.mark.parity(
    "Copies",
    "`swa_utils.AveragedModel` of the trained model",
    torch="averages its parameters",
)
@pytest.mark.parity(
    "Copies",
    "parameters in shared memory (`model.share_memory()`), before or after the optimizer is made",
    torch="are updated where they are",
    also=("test_workers.py::test_steps_of_another_process_are_seen_and_counted",),
)
@same_of_both
def test_models_that_are_averaged_or_shared(make: Make) -> object:
    model, late = (torch.nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))
    optimizer, average = make(model.share_memory().parameters(), lr=0.1), AveragedModel(model)
    optimizer.add_param_group({"params": late.parameters()})
    for step in range(6):
        if step == 3:
            late.share_memory()
        train(optimizer, 1)
        average.update_parameters(model)
    assert all(each.is_shared() for each in params_of(optimizer))
    return optimizer, average.module.weight.detach()
