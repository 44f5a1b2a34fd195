"""What training code does to `optimizer.state`: it is a dictionary of tensors to its users, and theirs to change."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from side_by_side import (
    Make,
    assert_same,
    beside_plain,
    both,
    fused_torch,
    of_this_torch,
    param,
    params_of,
    state_of,
    train,
)
from torch import Tensor
from torch.optim import Optimizer

from nexus.optim import FusedAdamW
from nexus.schedules import Constant
from nexus.training import capture_train_step, step_in_backward
from nexus.training.schedulers import WSDScheduler

Edit = Callable[[Optimizer, Tensor, Tensor], Any]  # optimizer, a trained parameter, one without a gradient

MOMENTS = ("exp_avg", "exp_avg_sq")


def resize_and_refill(optimizer: Optimizer, trained: Tensor, other: Tensor) -> None:
    """As offloading does (Megatron-LM): the tensors stay, their memory goes and comes back elsewhere."""
    moments = [optimizer.state[trained][name] for name in MOMENTS]
    kept = [moment.clone() for moment in moments]
    storages = [moment.untyped_storage() for moment in moments]
    sizes = [storage.nbytes() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    filler = [torch.full_like(each, 7.0) for each in kept]  # takes the freed memory
    for moment, storage, size, value in zip(moments, storages, sizes, kept, strict=True):
        storage.resize_(size)
        moment.copy_(value)
    del filler


def halve(optimizer: Optimizer, trained: Tensor, other: Tensor) -> None:
    for value in optimizer.state[trained].values():
        value.mul_(0.5)


EDITS: dict[str, Edit] = {
    "looked at": lambda o, p, q: o.state[q],
    "an empty dict": lambda o, p, q: o.state.update({p: {}, q: {}}),
    "cleared": lambda o, p, q: o.state[p].clear(),
    "popped": lambda o, p, q: o.state.pop(p),
    "all of it cleared": lambda o, p, q: o.state.clear(),
    "another dictionary": lambda o, p, q: setattr(o, "state", type(o.state)(dict, {p: dict(o.state[p])})),
    "a copy of an entry": lambda o, p, q: o.state.update({p: dict(o.state[p])}),
    "a key of the user's": lambda o, p, q: o.state[p].update(old=p.detach().clone()),
    "a string as a key": lambda o, p, q: o.state.update(epoch=3, wrapper={"step": "none"}),
    "clones": lambda o, p, q: o.state[p].update({name: value.clone() for name, value in o.state[p].items()}),
    "a moment assigned": lambda o, p, q: o.state[p].update(exp_avg=torch.full_like(p, 0.3)),
    "a moment's .data": lambda o, p, q: setattr(o.state[p]["exp_avg"], "data", torch.full_like(p, 0.3).detach()),
    "a count's .data": lambda o, p, q: setattr(o.state[p]["step"], "data", torch.full_like(o.state[p]["step"], 5.0)),
    "set_": lambda o, p, q: o.state[p]["exp_avg_sq"].set_(torch.full_like(p, 0.3).detach()),
    "swap_tensors": lambda o, p, q: torch.utils.swap_tensors(o.state[p]["exp_avg"], torch.full_like(p, 0.3).detach()),
    "memory freed and brought back": resize_and_refill,
    "halved": halve,
}


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What is freed here is freed by reference counts."""
    FusedAdamW([param(1)])  # the first optimizer of a process imports Dynamo, which keeps frames in cycles
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def edited(make: Make, edit: Edit, steps_between: int = 1) -> Optimizer:
    """A run in which the state is edited twice, once while a reference to it is at hand."""
    trained, other = param(3, 4), param(5)
    optimizer = make([trained, other], lr=0.1)
    for _ in range(2):
        for step in range(3):
            trained.grad = torch.full_like(trained, 0.5 + 0.1 * step)
            optimizer.step()
        edit(optimizer, trained, other)
    for step in range(4):
        trained.grad = torch.full_like(trained, 1.0 - 0.1 * step)
        optimizer.step()
    assert not optimizer.state.get(other) or "exp_avg" not in optimizer.state[other]
    other.grad = torch.ones_like(other)
    optimizer.step()
    return optimizer


@pytest.mark.parity(
    "Steps and state",
    "an entry of `optimizer.state` is looked at before there is one, emptied, deleted, replaced or added to; its "
    "tensors are written, replaced, given other memory (`.data`, `set_`, `swap_tensors`, a storage that is resized)",
    torch="the next step goes on with what is there, and fills an empty entry",
    nexus="same",
    also=("test_users_state.py::test_edits_on_each_backend",),
)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@of_this_torch
def test_edits(edit: Edit) -> None:
    assert_same(*both(lambda make: edited(make, edit)))


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_on_each_backend(edit: Edit, backend: str) -> None:
    assert_same(*beside_plain(lambda make: edited(make, edit), backend))


HELD: dict[str, tuple[Callable[[FusedAdamW, Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "the state": (lambda o, p: o.state, lambda held, p: held[p]["exp_avg"]),
    "an entry": (lambda o, p: o.state[p], lambda held, p: held["exp_avg"]),
    "a moment": (lambda o, p: o.state[p]["exp_avg"], lambda held, p: held),
    "a state dict": (lambda o, p: o.state_dict(), lambda held, p: held["state"][0]["exp_avg"]),
}


@pytest.mark.parametrize(("hold", "moment_of"), HELD.values(), ids=HELD)
def test_a_reference_that_is_kept_may_be_used_at_any_time(hold: Any, moment_of: Any, backend: str) -> None:
    weight = param(6)
    optimizer = FusedAdamW([weight], lr=0.1, backend=backend)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = hold(optimizer, weight)
    for _ in range(3):
        optimizer.step()
    moment_of(held, weight).data = torch.full_like(weight, 2.0).detach()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert optimizer.__dict__["state"][weight]["exp_avg"].tolist() == pytest.approx([1.8] * 6)


@pytest.mark.parametrize("name", ["step", *MOMENTS])
def test_a_storage_that_is_kept_may_be_resized_at_any_time(name: str, backend: str) -> None:
    weight = param(6)
    optimizer = FusedAdamW([weight], lr=0.1, backend=backend)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    storage, kept = optimizer.state[weight][name].untyped_storage(), optimizer.state[weight][name].clone()
    for _ in range(2):
        optimizer.step()
    size, before = storage.nbytes(), weight.tolist()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match=f"parameter 0 of group 0: state '{name}' has no memory"):
        optimizer.step()
    assert weight.tolist() == before
    storage.resize_(size)
    optimizer.state[weight][name].copy_(kept)
    optimizer.step()
    expected = {"step": 2.0, "exp_avg": 0.1 + 0.9 * 0.1, "exp_avg_sq": 0.001 + 0.999 * 0.001}[name]
    assert optimizer.state[weight][name].flatten()[0].item() == pytest.approx(expected)


@pytest.mark.parametrize("name", ["step", *MOMENTS])
@pytest.mark.parity(
    "Steps and state",
    "an entry of `optimizer.state` lacks its count or a moment",
    torch="`KeyError` at every step",
    nexus="the parameter begins anew, with a count and moments of 0; other keys stay",
    why="a moment without its count, or without the other moment, would make an update of any size",
)
@of_this_torch
def test_a_part_of_an_entry(name: str) -> None:
    def run(make: Make) -> Optimizer:
        weight = param(3)
        optimizer = make([weight], lr=0.1)
        train(optimizer)
        state_of(optimizer)["mine"] = 7
        del state_of(optimizer)[name]
        with torch.no_grad():
            weight.fill_(1.0)
        train(optimizer)
        assert state_of(optimizer).pop("mine") == 7
        return optimizer

    with pytest.raises(KeyError, match=name):
        run(fused_torch)
    anew = fused_torch([param(3)], lr=0.1)
    torch.manual_seed(1)
    train(FusedAdamW([param(3)]))  # as many random numbers
    train(anew)
    torch.manual_seed(1)
    assert_same(anew, run(FusedAdamW))


def test_a_first_step_that_is_interrupted() -> None:
    params = [param(3), param(4)]
    optimizer = FusedAdamW(params, lr=0.1)
    optimizer.state[params[0]]["step"] = torch.zeros((), dtype=torch.float64)  # as far as it came
    optimizer.state[params[1]]
    train(optimizer)
    expected = torch.optim.AdamW([param(3), param(4)], lr=0.1)
    torch.manual_seed(0)
    fresh = FusedAdamW([param(3), param(4)], lr=0.1)
    for each in (fresh, expected):
        torch.manual_seed(0)
        train(each)
    assert_same(expected, fresh)
    assert [int(optimizer.state[each]["step"]) for each in params] == [3, 3]


def test_an_entry_that_is_no_dict_is_named() -> None:
    optimizer = FusedAdamW([param(3)])
    optimizer.state[params_of(optimizer)[0]] = [1]
    with pytest.raises(TypeError, match=r"parameter 0 of group 0: its state must be a dict, got \[1\] \(list\)"):
        train(optimizer)


# Memory.


@pytest.mark.parity(
    "Steps and state",
    "`del optimizer.state[p]`; `del optimizer` after steps, without the garbage collector",
    torch="frees the moments at once; the parameters with the model",
    nexus="same",
    also=("test_users_state.py::test_what_is_dropped_is_freed_at_once",),
)
@of_this_torch
def test_what_is_deleted_is_freed() -> None:
    def run(make: Make) -> list[bool]:
        optimizer = make([param(30), param(40)], lr=0.1)
        train(optimizer)
        params = params_of(optimizer)
        storages = [weakref.ref(optimizer.state[each]["exp_avg"].untyped_storage()) for each in params]
        weights = [weakref.ref(each) for each in params]
        seen = [ref() is None for ref in storages]
        del optimizer.state[params.pop(0)]
        seen += [ref() is None for ref in storages]
        train(optimizer)  # makes anew
        del optimizer, params
        return seen + [ref() is None for ref in (*storages, *weights)]

    first, second = both(run)
    assert first == second == [False, False, True, False, True, True, True, True]


USES: dict[str, Callable[[FusedAdamW], Any]] = {
    "steps": lambda o: None,
    "a history": lambda o: o.history(),
    "a state dict": lambda o: o.state_dict(),
    "a load": lambda o: (o.load_state_dict(copy.deepcopy(o.state_dict())), train(o)),
    "a copy": lambda o: train(copy.deepcopy(o)),
    "a group added": lambda o: (o.add_param_group({"params": [param(2)]}), train(o)),
    "a refused step": lambda o: _sparse_step(o),
    "the state read": lambda o: (len(o.state), train(o, 1), len(o.state)),
}


def _sparse_step(optimizer: FusedAdamW) -> None:
    params_of(optimizer)[0].grad = torch.zeros(30, dtype=torch.float64).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_dropped_is_freed_at_once(use: Callable[[FusedAdamW], Any], backend: str) -> None:
    optimizer = FusedAdamW(
        [param(30), param(40)], lr=Constant(0.1), max_grad_norm=1.0, skip_nonfinite=True, backend=backend
    )
    train(optimizer)
    use(optimizer)
    alive = [weakref.ref(optimizer), *map(weakref.ref, params_of(optimizer))]
    alive += [weakref.ref(each) for state in optimizer.state.values() for each in state.values()]
    del optimizer
    assert [ref() for ref in alive] == [None] * len(alive)


COMPANIONS: dict[str, Callable[[torch.nn.Linear, FusedAdamW], Any]] = {
    "a scheduler of torch": lambda model, optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
    "a scheduler of nexus": lambda model, optimizer: WSDScheduler(optimizer, 2, 3, 4, 0.1),
    "updates in the backward pass": step_in_backward,
    "a captured step": lambda model, optimizer: capture_train_step(
        lambda x: (model(x).sum().backward(), optimizer.step(), x)[2], optimizer
    ),
    "a hook": lambda model, optimizer: optimizer.register_step_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("make", COMPANIONS.values(), ids=COMPANIONS)
def test_what_goes_with_an_optimizer_keeps_nothing(make: Callable[[torch.nn.Linear, FusedAdamW], Any]) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = FusedAdamW(model.parameters(), lr=0.1)
    companion = make(model, optimizer)
    for _ in range(3):
        if callable(companion):
            companion(torch.ones(2, 3))
        else:
            model(torch.ones(2, 3)).sum().backward()
            optimizer.step()
    storage = weakref.ref(optimizer.state[model.weight]["exp_avg"].untyped_storage())
    del optimizer.state[model.weight]
    assert storage() is None
    alive = [weakref.ref(optimizer), weakref.ref(model.bias), weakref.ref(optimizer.state[model.bias]["exp_avg"])]
    del companion, optimizer, model
    assert [ref() for ref in alive] == [None] * 3


SERIALIZERS: dict[str, Callable[[Any], int]] = {
    "pickle": lambda saved: len(pickle.dumps(saved)),
    "an entry by torch.save": lambda saved: _saved_size(saved["state"][0]),
    "a moment by torch.save": lambda saved: _saved_size(saved["state"][0]["exp_avg"]),
    "storages": lambda saved: sum(t.untyped_storage().nbytes() for s in saved["state"].values() for t in s.values()),
}


def _saved_size(saved: Any) -> int:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return len(buffer.getvalue())


@pytest.mark.parametrize("size_of", SERIALIZERS.values(), ids=SERIALIZERS)
@pytest.mark.parity(
    "State dicts",
    "a state dict, or a part of it, is written by `pickle` or `torch.save`",
    torch="takes the bytes of its tensors",
    nexus="same",
)
@of_this_torch
def test_a_state_dict_costs_its_own_size(size_of: Callable[[Any], int]) -> None:
    def run(make: Make) -> int:
        optimizer = make([param(64, dtype=torch.float32) for _ in range(50)], lr=0.1)
        train(optimizer)
        return size_of(optimizer.state_dict())

    first, second = both(run)
    assert second == pytest.approx(first, rel=0.1)
