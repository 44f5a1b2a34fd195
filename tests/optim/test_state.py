"""What training code does to `optimizer.state`: it is a dictionary of tensors to its users, and theirs to change."""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    step_both,
)
from side_by_side import Make, assert_same, both, fused_torch, of_this_torch, param, state_of, train
from torch import Tensor
from torch.optim import Optimizer

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

Edit = Callable[[Any, Tensor, Tensor], Any]  # optimizer, a trained parameter, one without a gradient

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextlib.contextmanager
def freed(storage: torch.UntypedStorage) -> Iterator[None]:
    """Memory that goes and comes back elsewhere, as offloading does (Megatron-LM) with what is not in use."""
    kept = storage.clone()
    storage.resize_(0)
    others = torch.full((kept.nbytes(),), 7, dtype=torch.uint8)  # may be where it was
    yield
    assert (others == 7).all()
    storage.resize_(kept.nbytes())
    storage.copy_(kept)


def free_and_bring_back(optimizer: Optimizer, trained: Tensor, other: Tensor) -> None:
    for name in MOMENTS:
        with freed(optimizer.state[trained][name].untyped_storage()):
            pass


EDITS: dict[str, Edit] = {
    "looked at": lambda o, p, q: o.state[q],
    "an empty dict": lambda o, p, q: o.state.update({p: {}, q: {}}),
    "cleared": lambda o, p, q: o.state[p].clear(),
    "popped": lambda o, p, q: o.state.pop(p),
    "all of it cleared": lambda o, p, q: o.state.clear(),
    "another dictionary": lambda o, p, q: setattr(o, "state", type(o.state)(dict, {p: dict(o.state[p])})),
    "__setstate__": lambda o, p, q: o.__setstate__({"state": collections.defaultdict(dict)}),
    "a copy of an entry": lambda o, p, q: o.state.update({p: dict(o.state[p])}),
    "a key of the user's": lambda o, p, q: o.state[p].update(old=p.detach().clone()),
    "a string as a key": lambda o, p, q: o.state.update(epoch=3, wrapper={"step": "none"}),
    "clones": lambda o, p, q: o.state[p].update({name: value.clone() for name, value in o.state[p].items()}),
    "a moment assigned": lambda o, p, q: o.state[p].update(exp_avg=torch.full_like(p, 0.3)),
    "a moment's .data": lambda o, p, q: setattr(o.state[p]["exp_avg"], "data", torch.full_like(p, 0.3).detach()),
    "a count's .data": lambda o, p, q: setattr(o.state[p]["step"], "data", torch.full_like(o.state[p]["step"], 5.0)),
    "set_": lambda o, p, q: o.state[p]["exp_avg_sq"].set_(torch.full_like(p, 0.3).detach()),
    "swap_tensors": lambda o, p, q: torch.utils.swap_tensors(o.state[p]["exp_avg"], torch.full_like(p, 0.3).detach()),
    "moved to shared memory": lambda o, p, q: [value.share_memory_() for value in o.state[p].values()],
    "memory freed and brought back": free_and_bring_back,
    "halved": lambda o, p, q: [value.mul_(0.5) for value in o.state[p].values()],
}


@pytest.mark.parity(
    "Steps and state",
    "an entry of `optimizer.state` is looked at before there is one, emptied, deleted, replaced or added to; its "
    "tensors are written, replaced, given other memory (`.data`, `set_`, `swap_tensors`, a storage that is resized)",
    torch="the next step goes on with what is there, and fills an empty entry",
    nexus="same",
)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits(edit: Edit, backend: str) -> None:
    def run(make: Make) -> Optimizer:
        trained, other = param(3, 4), param(5)
        optimizer = make([trained, other], lr=0.1)
        for _ in range(2):
            steps(optimizer, trained, 0.5, 0.6, 0.7)
            edit(optimizer, trained, other)
        steps(optimizer, trained, 1.0, 0.9, 0.8, 0.7)
        assert not optimizer.state.get(other) or "exp_avg" not in optimizer.state[other]
        steps(optimizer, other, 1.0)
        return optimizer

    assert_same(*both(run, backend))


def steps(optimizer: Optimizer, weight: Tensor, *gradients: float) -> None:
    for value in gradients:
        weight.grad = torch.full_like(weight, value)
        optimizer.step()


def one_step(backend: str, size: int = 6, gradient: float = 1.0) -> tuple[Tensor, FusedAdamW]:
    """A parameter and its optimizer, after a step."""
    weight = param(size)
    optimizer = FusedAdamW([weight], lr=0.1, backend=backend)
    steps(optimizer, weight, gradient)
    return weight, optimizer


@pytest.mark.parametrize(
    "edit", ["an empty dict", "cleared", "popped", "all of it cleared", "__setstate__", "clones"]
)
def test_nothing_is_written_to_state_that_is_gone(backend: str, edit: str) -> None:
    weight, optimizer = one_step(backend)
    gone = list(optimizer.state[weight].values())
    kept = [value.clone() for value in gone]
    EDITS[edit](optimizer, weight, param(1))
    optimizer.step()
    assert same_bits(gone, kept)


# References that are kept.


def to_shared_memory(alias: Tensor, weight: Tensor) -> None:
    alias.share_memory_().fill_(2.0)  # as a queue of torch.multiprocessing moves it


def assign(moment: Tensor) -> None:
    moment.data = torch.full_like(moment, 2.0)


def an_entry_of_a_kept_state(optimizer: FusedAdamW, weight: Tensor) -> Any:
    state = optimizer.state
    optimizer.step()
    return state[weight]


# What is kept from the state, and what makes the first moment 2.0 through it.
HELD: dict[str, tuple[Callable[[FusedAdamW, Tensor], Any], Callable[[Any, Tensor], None]]] = {
    "the state": (lambda o, p: o.state, lambda held, p: assign(held[p]["exp_avg"])),
    "an entry": (lambda o, p: o.state[p], lambda held, p: assign(held["exp_avg"])),
    "a moment": (lambda o, p: o.state[p]["exp_avg"], lambda held, p: assign(held)),
    "a state dict": (lambda o, p: o.state_dict(), lambda held, p: assign(held["state"][0]["exp_avg"])),
    "a tensor over a moment": (lambda o, p: o.state[p]["exp_avg"].detach(), to_shared_memory),
    "an entry of a kept state": (
        an_entry_of_a_kept_state,
        lambda held, p: held.update(exp_avg=torch.full_like(p, 2.0).detach()),
    ),
}


@pytest.mark.parametrize(("hold", "change"), HELD.values(), ids=HELD)
def test_a_reference_that_is_kept_may_be_used_at_any_time(hold: Any, change: Any, backend: str) -> None:
    weight, optimizer = one_step(backend, size=2000)
    held = hold(optimizer, weight)
    for _ in range(3):
        optimizer.step()
    change(held, weight)
    others = [torch.full((2000,), 9.0) for _ in range(10)]  # one may be where the moment was
    steps(optimizer, weight, 0.0)
    assert optimizer.__dict__["state"][weight]["exp_avg"].tolist() == pytest.approx([1.8] * 2000)
    assert all((each == 9.0).all() for each in others)


@pytest.mark.parametrize("name", ["parameter", "step", *MOMENTS])
def test_a_storage_that_is_kept_may_be_resized_at_any_time(name: str, backend: str) -> None:
    params = make_params([(64,), (9,)])
    optimizer, reference = run_beside_torch(params, backend)
    state = optimizer.state[params[0]]
    storage = (params[0] if name == "parameter" else state[name]).untyped_storage()
    del state
    missing = " has no memory, and a gradient" if name == "parameter" else f": state '{name}' has no memory"
    for _ in range(3):
        step_both(optimizer, reference, steps=2)
        others = params[name == "parameter" :]
        before = copies(others)
        with freed(storage), pytest.raises(RuntimeError, match=f"parameter 0 of group 0{missing}"):
            optimizer.step()
        assert same_bits(before, others)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


def test_a_change_before_a_refused_call_is_not_overlooked_after_it(backend: str) -> None:
    weight, optimizer = one_step(backend, gradient=0.0)
    optimizer.step()
    optimizer.state[weight]["exp_avg"] = torch.full_like(weight, 2.0).detach()
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.sync_hyperparameters()
    weight.grad = weight.grad.to_dense()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([1.8] * 6)


def test_what_is_replaced_after_a_refused_step_is_not_overlooked(backend: str) -> None:
    weight, optimizer = one_step(backend, gradient=0.0)
    optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = "yes"
    with pytest.raises(TypeError, match="amsgrad must be a bool"):
        optimizer.step()
    optimizer.param_groups[0]["amsgrad"] = False
    optimizer.state[weight]["exp_avg"] = torch.full_like(weight, 2.0).detach()
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].tolist() == pytest.approx([1.8] * 6)


def test_a_moment_may_have_another_layout_and_dtype(backend: str) -> None:
    params = make_params([(6, 7), (5,)])
    optimizer, reference = run_beside_torch(params, backend)
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].double().t().contiguous().t()
    state["step"] = state["step"].float()  # as torch's
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


# Entries that are not whole.


@pytest.mark.parametrize("names", [("step",), *((name,) for name in MOMENTS), MOMENTS], ids=str)
@pytest.mark.parity(
    "Steps and state",
    "an entry of `optimizer.state` lacks its count or a moment",
    torch="`KeyError` at every step",
    nexus="the parameter begins anew, with a count and moments of 0; other keys stay",
    why="a moment without its count, or without the other moment, would make an update of any size",
)
@of_this_torch
def test_a_part_of_an_entry(names: tuple[str, ...]) -> None:
    def run(make: Make) -> Optimizer:
        weight = param(3)
        optimizer = make([weight], lr=0.1)
        train(optimizer)
        state_of(optimizer)["mine"] = 7
        for name in names:
            del state_of(optimizer)[name]
        with torch.no_grad():
            weight.fill_(1.0)
        torch.manual_seed(1)
        train(optimizer)
        assert state_of(optimizer).pop("mine") == 7
        return optimizer

    with pytest.raises(KeyError, match=names[0]):
        run(fused_torch)
    anew = fused_torch([param(3)], lr=0.1)
    torch.manual_seed(1)
    train(anew)
    assert_same(anew, run(FusedAdamW))


def change_shape(optimizer: Any, trained: Tensor, other: Tensor) -> None:
    trained.data = torch.zeros(6)
    trained.grad = torch.ones(6)


# an edit, and what is said about it
UNFIT: dict[str, tuple[Edit, type[Exception], str]] = {
    "no dict": (lambda o, p, q: o.state.update({p: [1]}), TypeError, r"its state must be a dict, got \[1\] \(list\)"),
    "another shape": (
        lambda o, p, q: o.state[p].update(exp_avg=torch.zeros(4)),
        ValueError,
        r"state 'exp_avg' must be of shape \(5,\)",
    ),
    "no tensor": (
        lambda o, p, q: o.state[p].update(exp_avg_sq=3.0),
        ValueError,
        r"state 'exp_avg_sq' must be of shape \(5,\) on \S+, got float",
    ),
    "the parameter's shape changes": (change_shape, ValueError, r"state 'exp_avg' must be of shape \(6,\)"),
}


@pytest.mark.parametrize(("edit", "error", "words"), UNFIT.values(), ids=UNFIT)
def test_state_that_does_not_fit_is_refused(edit: Edit, error: type[Exception], words: str, backend: str) -> None:
    params = make_params([(5,), (4,)])
    optimizer, _ = run_beside_torch(params, backend)
    edit(optimizer, *params)
    before = copies(params)
    with pytest.raises(error, match=f"parameter 0 of group 0: {words}"):
        optimizer.step()
    assert same_bits(before, params)
    del optimizer.state[params[0]]
    optimizer.step()  # begins anew
    assert not any(torch.equal(*pair) for pair in zip(before, params, strict=True))


def test_state_of_a_parameter_that_is_in_no_group_is_named_when_saving(backend: str) -> None:
    params = make_params([(5,), (3, 4)])
    optimizer, _ = run_beside_torch(params, backend)
    gone = optimizer.param_groups[0]["params"].pop()
    optimizer.state[torch.zeros(3)]  # torch's state is a defaultdict: to look is to make an empty one
    for _ in range(2):  # torch: a KeyError with the parameter's id
        with pytest.raises(RuntimeError, match=r"of shape \(3, 4\) that is in no group .*`del optimizer.state\[p\]`"):
            optimizer.state_dict()
    optimizer.param_groups[0]["params"].append(gone)
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]
    optimizer.param_groups[0]["params"].pop()
    del optimizer.state[gone]
    saved = optimizer.state_dict()
    assert (list(saved["state"]), saved["param_groups"][0]["params"]) == ([0], [0])
    FusedAdamW(copies(params[:1]), backend=backend).load_state_dict(saved)


# Defaults of the process.


@pytest.fixture
def restored_defaults() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("restored_defaults")
@pytest.mark.parametrize("default", ["cpu", "meta", torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "lr",
    [0.01, torch.tensor(0.01), WSD(warmup_steps=2, stable_steps=20, decay_steps=5, peak_lr=1e-2)],
    ids=["float", "tensor", "schedule"],
)
def test_state_is_made_for_the_parameters_whatever_the_defaults(backend: str, lr: Any, default: Any) -> None:
    params = make_params([(5,), (3, 2)])
    options = {"amsgrad": True, "max_grad_norm": 1.0}
    reference = Float64AdamW(params, lr=float(lr) if isinstance(lr, Tensor) else lr, **options)
    rounds = [make_grads(params) for _ in range(8)]
    for grads in rounds:
        reference.step(grads)
    (torch.set_default_device if isinstance(default, str) else torch.set_default_dtype)(default)
    optimizer = FusedAdamW(params, lr=lr, backend=backend, **options)
    for count, grads in enumerate(rounds):
        set_grads(params, grads)
        optimizer.step()
        if count == 2:  # with counts of torch's type
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][0]["step"] = saved["state"][0]["step"].float()
            optimizer.load_state_dict(saved)
        if count == 4:  # as some put them there
            optimizer.state[params[1]]["step"] = optimizer.state[params[1]]["step"].float()
        if count == 6:
            optimizer.state[params[0]]["step"] = float(optimizer.state[params[0]]["step"])
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert_same_run(optimizer, reference)
    assert {value.device for state in optimizer.state.values() for value in state.values()} == {params[0].device}
    assert optimizer.grad_norm.dtype == torch.float64


@pytest.mark.usefixtures("restored_defaults")
def test_a_count_that_is_a_float_is_not_rounded_to_the_default_type(backend: str) -> None:
    weight, optimizer = one_step(backend)
    optimizer.state[weight]["step"] = 2.0**24 + 1
    torch.set_default_dtype(torch.bfloat16)
    assert float(optimizer.state_dict()["state"][0]["step"]) == 2**24 + 1
    optimizer.step()
    assert int(optimizer.state[weight]["step"]) == 2**24 + 2
