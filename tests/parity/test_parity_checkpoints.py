"""State dicts and copies: rows of docs/parity.md."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from references import make_params, same_bits, snapshot
from side_by_side import (
    Make,
    assert_same,
    both,
    errors,
    fused_torch,
    of_this_torch,
    param,
    state_of,
    train,
)

from nexus.optim import FusedAdamW

pytestmark = of_this_torch


def trained(make: Make, steps: int = 3, **options: Any) -> torch.optim.Optimizer:
    optimizer = make(make_params([(5,), (2, 3)], torch.float64), **{"lr": 0.1, **options})
    train(optimizer, steps)
    return optimizer


def kept(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its state dict, as one of a file."""
    return copy.deepcopy(optimizer.state_dict())


def loaded(make: Make, saved: dict[str, Any], **options: Any) -> torch.optim.Optimizer:
    """An optimizer that has trained, and then loads."""
    optimizer = trained(make, **options)
    optimizer.load_state_dict(saved)
    return optimizer


@pytest.mark.parity(
    "State dicts",
    "what a state dict holds",
    torch="`state` by the number of the parameter, `param_groups` with the numbers; plain types and tensors, so that "
    "`torch.load(weights_only=True)` reads it",
    nexus="the same, and `nexus_format`, a number",
    why="a checkpoint of a later release is refused and not misread",
    also=("test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",),
)
def test_what_a_state_dict_holds() -> None:
    def seen(make: Make) -> list[Any]:
        saved = trained(make).state_dict()
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=True), saved, rtol=0, atol=0)
        names = {key: set(state) for key, state in saved["state"].items()}
        return [list(saved), names, saved["param_groups"][0]["params"]]

    first, second = both(seen)
    names = {"step", "exp_avg", "exp_avg_sq"}
    assert first == [["state", "param_groups"], {0: names, 1: names}, [0, 1]]
    assert second == [["state", "param_groups", "nexus_format"], {0: names, 1: names}, [0, 1]]


@pytest.mark.parity(
    "State dicts",
    "dtype of `step` in a state dict",
    torch="float32",
    nexus="float64",
    why="floats, as torch writes them, and exact up to 2**53",
    also=("test_counters.py::test_counts_go_on_beyond_what_float32_holds",),
)
def test_the_dtype_of_steps_that_are_saved() -> None:
    def dtype(make: Make) -> tuple[torch.dtype, float]:
        step = trained(make).state_dict()["state"][0]["step"]
        return step.dtype, step.item()

    assert both(dtype) == ((torch.float32, 3.0), (torch.float64, 3.0))


@pytest.mark.parity(
    "State dicts",
    "options, on loading: `lr`, `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize`",
    torch="come from the state dict; where an older one lacks the last two, they are `False`",
    nexus="same",
    also=("test_checkpoint_foreign.py::test_the_same_numbers_go_on",),
)
def test_options_come_from_the_state_dict() -> None:
    options: dict[str, Any] = {"lr": 0.5, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.2}

    def options_loaded(make: Make, older: bool) -> dict[str, Any]:
        saved = kept(trained(make, **options, amsgrad=not older, maximize=not older))
        if older:
            del saved["param_groups"][0]["amsgrad"], saved["param_groups"][0]["maximize"]
        group = loaded(make, saved).param_groups[0]
        return {name: group[name] for name in (*options, "amsgrad", "maximize")}

    for older in (False, True):
        first, second = both(lambda make, older=older: options_loaded(make, older))
        assert first == second == {**options, "amsgrad": not older, "maximize": not older}


@pytest.mark.parity(
    "State dicts",
    "`foreach`, `fused` and `capturable`, on loading",
    torch="overwritten: after a checkpoint of `foreach=True`, an optimizer made with `fused=True` is no longer fused",
    nexus="not there to be overwritten; the backend stays",
    why="which kernels run is for this machine to say, and not for the one that saved",
    also=("test_pitfalls.py::test_a_load_takes_over_no_implementation",),
)
def test_a_load_takes_over_no_implementation() -> None:
    saved = kept(trained(lambda params, **options: torch.optim.AdamW(params, foreach=True, **options)))
    saved["param_groups"][0]["capturable"] = True  # as of a run on a GPU
    peer, optimizer = both(lambda make: loaded(make, saved))
    assert [peer.param_groups[0][name] for name in ("fused", "foreach", "capturable")] == [None, True, True]
    assert {"fused", "foreach", "capturable"}.isdisjoint(optimizer.param_groups[0])
    assert optimizer.backend == "native"


@pytest.mark.parity(
    "State dicts",
    "a tensor `lr`, on loading",
    torch="replaced by what was saved, a tensor or a float",
    nexus="keeps its tensor, into which the saved rate is written",
    why="a graph or a scheduler may hold it",
    also=("test_checkpoint.py::test_counters_and_rates_are_loaded_in_place",),
)
@pytest.mark.parametrize("saved_as", ["tensor", "float"])
def test_a_tensor_rate_on_loading(saved_as: str) -> None:
    def seen(make: Make) -> tuple[bool, float]:
        saved = kept(trained(make, lr=torch.tensor(0.5) if saved_as == "tensor" else 0.5))
        rate = torch.tensor(0.125)
        now = loaded(make, saved, lr=rate).param_groups[0]["lr"]
        return now is rate, float(now)

    assert both(seen) == ((False, 0.5), (True, 0.5))


@pytest.mark.parity(
    "State dicts",
    "a tensor `lr`, on saving",
    torch="the state dict holds the very tensor, and changes with it",
    nexus="the state dict holds a float",
    why="a checkpoint in memory is that of its moment, and can be written as JSON",
    also=("test_rates_torch.py::test_a_tensor_rate_is_not_aliased",),
)
def test_a_tensor_rate_on_saving() -> None:
    def seen(make: Make) -> tuple[type, float]:
        rate = torch.tensor(0.5)
        saved = trained(make, lr=rate).state_dict()["param_groups"][0]["lr"]
        rate.fill_(0.25)
        return type(saved), float(saved)

    assert both(seen) == ((torch.Tensor, 0.25), (float, 0.5))


@pytest.mark.parity(
    "State dicts",
    "moments and counts of an optimizer that has some, on loading",
    torch="replaced; where dtypes agree, by the very tensors of the dict, which the next step then changes",
    nexus="replaced, by copies; written in place where a step in a graph points to them",
    why="a dict may be loaded twice",
    also=(
        "test_checkpoint.py::test_moments_that_a_graph_points_to_are_loaded_in_place",
        "test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",
    ),
)
def test_moments_on_loading() -> None:
    def seen(make: Make) -> tuple[bool, bool]:
        saved, optimizer = kept(trained(make)), trained(make)
        before, there = copy.deepcopy(saved), state_of(optimizer)["exp_avg"]
        optimizer.load_state_dict(saved)
        train(optimizer)
        unchanged = same_bits(*(list(each["state"][0].values()) for each in (saved, before)))
        assert saved["param_groups"] == before["param_groups"]
        return state_of(optimizer)["exp_avg"] is there, unchanged

    assert both(seen) == ((False, False), (False, True))


@pytest.mark.parity(
    "State dicts",
    "float32 moments for bfloat16 parameters, on loading",
    torch="rounded to bfloat16",
    nexus="stay float32, bit for bit",
    why="see the rows about bfloat16",
    also=("test_checkpoint.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit",),
)
def test_float32_moments_of_bfloat16_parameters() -> None:
    saved = kept(trained(FusedAdamW))
    for state in saved["state"].values():
        state.update(exp_avg=state["exp_avg"].float(), exp_avg_sq=state["exp_avg_sq"].float())

    def moment(make: Make) -> torch.Tensor:
        optimizer = make(make_params([(5,), (2, 3)], torch.bfloat16))
        optimizer.load_state_dict(copy.deepcopy(saved))
        return state_of(optimizer)["exp_avg"]

    first, second = both(moment)
    assert first.dtype == torch.bfloat16
    assert same_bits([second], [saved["state"][0]["exp_avg"]])


@pytest.mark.parity(
    "State dicts",
    "a state dict with another number of groups, or of parameters in a group",
    torch="`ValueError`",
    nexus="same",
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
    groups = [{"params": [param(*shape)]} for shape in shapes]
    first, second = errors(lambda make: make(groups).load_state_dict(kept(trained(make))), [ValueError])
    assert torchs in first
    assert ours in second


@pytest.mark.parity(
    "State dicts",
    "moments of another shape than the parameter's",
    torch="loaded, and used by the next steps without an error",
    nexus="`ValueError` that names the entry; nothing is changed",
    why="everything is checked before anything is written",
    also=("test_checkpoint_errors.py::test_a_dict_that_does_not_fit_is_named_and_changes_nothing",),
)
def test_moments_that_do_not_fit() -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        saved = kept(trained(make))
        saved["state"][1]["exp_avg"] = torch.zeros(7, dtype=torch.float64)
        return loaded(make, saved)

    peer = run(fused_torch)
    train(peer)
    assert state_of(peer, 1)["exp_avg"].shape == (7,)
    with pytest.raises(ValueError, match=r"state\[1\] of the loaded .*exp_avg must be of shape \(2, 3\)"):
        run(FusedAdamW)


@pytest.mark.parity(
    "State dicts",
    "the state dict of another optimizer: `SGD`, `NAdam`",
    torch="NAdam's is loaded, and its moments are used; SGD's is `KeyError: 'step'`, after its groups are loaded",
    nexus="`ValueError` that says so",
    why="an error belongs where the mistake is",
    also=("test_checkpoint_errors.py::test_another_optimizers_state_is_refused",),
)
def test_another_optimizers_state() -> None:
    sgd = kept(trained(lambda params, **options: torch.optim.SGD(params, momentum=0.9, **options)))
    nadam = kept(trained(torch.optim.NAdam))
    peer = loaded(fused_torch, nadam)
    train(peer)
    assert int(state_of(peer)["step"]) == 6
    peer = trained(fused_torch)
    with pytest.raises(KeyError, match="step"):
        peer.load_state_dict(sgd)
    assert "momentum" in peer.param_groups[0]
    for saved in (sgd, nadam):
        with pytest.raises(ValueError, match="not AdamW's"):
            loaded(FusedAdamW, saved)


@pytest.mark.parity(
    "State dicts",
    "a load that fails",
    torch="has replaced groups and moments before the error comes",
    nexus="leaves all as it was",
    why="everything is checked before anything is written",
    also=("test_checkpoint_errors.py::test_a_dict_that_does_not_fit_is_named_and_changes_nothing",),
)
def test_a_load_that_fails() -> None:
    def load(make: Make) -> tuple[float, bool]:
        optimizer, saved = trained(make), kept(trained(make, lr=0.5))
        before = snapshot(optimizer)
        del saved["state"][1]["step"]
        with pytest.raises((KeyError, ValueError), match="step"):
            optimizer.load_state_dict(saved)
        return optimizer.param_groups[0]["lr"], same_bits(before, snapshot(optimizer))

    assert both(load) == ((0.5, False), (0.1, True))


@pytest.mark.parity(
    "State dicts",
    "a state dict without state, on an optimizer that has some",
    torch="the state is gone; moments and counts begin anew",
    nexus="same",
)
def test_a_state_dict_without_state(backend: str) -> None:
    def run(make: Make) -> tuple[int, torch.optim.Optimizer]:
        optimizer = loaded(make, kept(trained(make, steps=0)))
        left = len(optimizer.state)
        train(optimizer)
        return left, optimizer

    (first, peer), (second, optimizer) = both(run, backend)
    assert (first, second) == (0, 0)
    assert_same(peer, optimizer)
    assert int(state_of(optimizer)["step"]) == 3
