"""Memory: a step takes none, what is dropped is freed at once, what is saved costs its own size."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from references import make_grads, make_params, set_grads
from side_by_side import Make, both, of_this_torch, param, params_of, same_of_both, train
from torch.utils._python_dispatch import TorchDispatchMode

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Cosine
from nexus.training import capture_train_step, step_in_backward
from nexus.training.schedulers import WSDScheduler


@pytest.fixture(autouse=True, scope="module")
def _no_collector() -> Iterator[None]:
    """What is freed here is freed by reference counts."""
    FusedAdamW([param(1)])  # the first optimizer of a process imports Dynamo, which keeps frames in cycles
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class NoOperations(TorchDispatchMode):
    """Not one operation of torch may run, thus not one tensor be made."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is called")


OPTIONS: dict[str, dict[str, Any]] = {
    "float": {"lr": 1e-3},
    "schedule": {
        "lr": WSD(warmup_steps=3, stable_steps=50, decay_steps=50, peak_lr=0.1),
        "max_grad_norm": 1.0,
        "skip_nonfinite": True,
        "amsgrad": True,
    },
    "tensor": {"lr": torch.tensor(0.1), "weight_decay": Cosine(peak_lr=0.1, total_steps=20)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_step_allocates_nothing(options: dict[str, Any]) -> None:
    params = make_params([(40,), (3, 5), (), (0,)]) + make_params([(600,)], torch.bfloat16)
    optimizer = FusedAdamW(params, backend="native", **options)
    train(optimizer, 3)
    set_grads(params, make_grads(params))
    with NoOperations():
        optimizer.step()  # with new gradients
        optimizer.step()  # and with the same
    tracemalloc.start()
    try:
        for _ in range(10):
            optimizer.step()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(100):
            optimizer.step()
        now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now - before < 512
    assert peak - before < 4096


@pytest.mark.parity(
    "Steps and state",
    "`del optimizer.state[p]`; `del optimizer` after steps, without the garbage collector",
    torch="frees the moments at once; the parameters with the model",
    nexus="same",
    also=("test_memory.py::test_what_is_dropped_is_freed_at_once",),
)
@of_this_torch
@same_of_both
def test_what_is_deleted_is_freed(make: Make) -> object:
    optimizer = make([param(30), param(40)], lr=0.1)
    train(optimizer)
    params = params_of(optimizer)
    storages = [weakref.ref(optimizer.state[each]["exp_avg"].untyped_storage()) for each in params]
    weights = [weakref.ref(each) for each in params]
    del optimizer.state[params.pop(0)]
    assert [ref() is None for ref in storages] == [True, False]
    train(optimizer)  # makes anew
    del optimizer, params
    assert [ref() for ref in (*storages, *weights)] == [None] * 4
    return None


def test_what_is_deleted_in_the_middle_of_a_step_is_held_to_its_end() -> None:
    weight = param(3)
    optimizer = FusedAdamW([weight], lr=0.1)
    train(optimizer)
    runner: Any = engine_of(optimizer).runner
    storage = weakref.ref(optimizer.state[weight]["exp_avg"].untyped_storage())
    assert runner.changed(vars(optimizer)) == 0  # where a step begins
    del optimizer.state[weight]  # as another thread may
    assert storage() is not None
    runner.records.release_gradients()  # where it ends
    assert storage() is None


def test_memory_that_a_parameter_has_left_is_freed(backend: str) -> None:
    model = torch.nn.Linear(3, 4)
    optimizer = FusedAdamW(model.parameters(), lr=0.1, backend=backend)
    train(optimizer)
    left = [weakref.ref(each.untyped_storage()) for each in model.parameters()]
    model.to(torch.float64)
    assert [ref() for ref in left] == [None, None]


class Hook:
    """Lives as long as the graph that it is registered in."""

    def __call__(self, grad: torch.Tensor) -> None: ...


@pytest.mark.parametrize("fails", [False, True], ids=["step", "refused step"])
def test_gradients_are_not_kept_alive(fails: bool, backend: str) -> None:
    params = make_params([(5,), (6, 4)])
    optimizer = FusedAdamW(params, backend=backend)
    train(optimizer)
    factor, hook = torch.ones(4, 6, requires_grad=True), Hook()
    params[1].grad = (factor * 2).t()  # is copied; has a graph, as of backward(create_graph=True)
    params[1].grad.register_hook(hook)
    if fails:
        optimizer.grad_scale = "none"
    with pytest.raises((AttributeError, TypeError)) if fails else contextlib.nullcontext():
        optimizer.step()
    grads = [each.grad for each in params]
    alive = [weakref.ref(each) for each in (hook, *grads, *(grad.untyped_storage() for grad in grads))]
    assert not any(value.requires_grad for value in optimizer.state[params[1]].values())
    optimizer.zero_grad()
    del grads, hook
    assert [ref() for ref in alive] == [None] * 5


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


def references_to(optimizer: FusedAdamW) -> list[weakref.ref[Any]]:
    """To itself, its parameters and their state."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [weakref.ref(each) for each in (optimizer, *params_of(optimizer), *states)]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_what_is_dropped_is_freed_at_once(use: Callable[[FusedAdamW], Any], backend: str) -> None:
    options: dict[str, Any] = {"lr": Constant(0.1), "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = FusedAdamW([param(30), param(40)], backend=backend, **options)
    train(optimizer)
    use(optimizer)
    alive = references_to(optimizer)
    del optimizer
    assert [ref() for ref in alive] == [None] * len(alive)


def test_an_optimizer_that_its_parameters_refer_to_is_collected(backend: str) -> None:
    optimizer = FusedAdamW([param(5), param(6, 4)], lr=Cosine(peak_lr=0.1, total_steps=10), backend=backend)
    train(optimizer)
    first, second = params_of(optimizer)
    first.owner = optimizer
    second.register_hook(lambda grad, owner=optimizer: None)
    alive = references_to(optimizer)
    del optimizer, first, second
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


COMPANIONS: dict[str, Callable[[torch.nn.Linear, FusedAdamW], Any]] = {
    "a scheduler of torch": lambda model, optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0),
    "a scheduler of nexus": lambda model, optimizer: WSDScheduler(
        optimizer, warmup_steps=2, stable_steps=3, decay_steps=4, peak_lr=0.1
    ),
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
    alive = references_to(optimizer)
    del companion, optimizer, model
    assert [ref() for ref in alive] == [None] * len(alive)


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
