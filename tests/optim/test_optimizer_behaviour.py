"""A FusedAdamW is a `torch.optim.Optimizer` like any other, and keeps nothing alive that it should not."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import tracemalloc
import weakref
from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_parameter,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Cosine


def test_it_is_an_optimizer(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]), lr=Cosine(1.0, 10), backend=backend)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.backend == backend
    assert "FusedAdamW" in repr(optimizer)
    assert "weight_decay" in repr(optimizer)
    assert optimizer.defaults["betas"] == (0.9, 0.999)


def test_the_best_backend_is_chosen() -> None:
    assert FusedAdamW(make_params([(3,)])).backend == "native"


# Closures and hooks.


def test_a_closure_is_evaluated_once_with_gradients(backend: str) -> None:
    params = make_params([(3,)])
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(params)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    for step in range(3):
        expected = params[0].detach().square().sum()
        grads = [2 * params[0].detach()]
        with torch.no_grad():
            loss = optimizer.step(closure)
        reference.step(grads)
        assert torch.equal(loss, expected)
        assert calls == step + 1
    assert optimizer.step() is None
    reference.step(grads)
    assert_same_run(optimizer, reference)


def test_step_hooks_of_the_optimizer_and_of_all(backend: str) -> None:
    params = make_params([(3,)])
    optimizer, reference = run_beside_torch(params, backend)
    calls: list[str] = []

    def hook(name: str) -> Any:
        return lambda each, args, kwargs: calls.append(name) if each is optimizer else None

    handles = [
        optimizer.register_step_pre_hook(hook("own before")),
        optimizer.register_step_post_hook(hook("own after")),
        register_optimizer_step_pre_hook(hook("all before")),
        register_optimizer_step_post_hook(hook("all after")),
    ]
    try:
        step_both(optimizer, reference, steps=1)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(calls) == ["all after", "all before", "own after", "own before"]
    assert {name.split()[1] for name in calls[:2]} == {"before"}
    step_both(optimizer, reference, steps=1)
    assert len(calls) == 4
    assert_same_run(optimizer, reference)


def test_a_pre_hook_may_change_the_arguments(backend: str) -> None:
    params = make_params([(3,)])
    optimizer = FusedAdamW(params, backend=backend)
    set_grads(params, make_grads(params))
    optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


def test_the_profiler_sees_a_range(backend: str) -> None:
    params = make_params([(3,)])
    optimizer, reference = run_beside_torch(params, backend)
    with torch.profiler.profile() as profile:
        step_both(optimizer, reference, steps=2)
    ranges = [event for event in profile.key_averages() if event.key == "Optimizer.step#FusedAdamW.step"]
    assert [event.count for event in ranges] == [2]
    assert_same_run(optimizer, reference)


def test_a_step_within_backward(backend: str) -> None:
    params = make_params([(3,), (4,)])
    reference = Float64AdamW(params)
    optimizers = {param: FusedAdamW([param], backend=backend) for param in params}

    def step(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in params:
        param.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        before = [param.detach().clone() for param in params]
        (params[0].square().sum() + params[1].pow(3).sum()).backward()
        reference.step([2 * before[0], 3 * before[1].square()])
    for index, param in enumerate(params):
        assert param.grad is None
        assert_same_parameter(optimizers[param], param, reference, index)


def test_an_update_is_seen_by_autograd(backend: str) -> None:
    for param in (make_params([(3, 4)])[0], torch.nn.Parameter(torch.ones(3, 8)[:, ::2])):
        idle = torch.nn.Parameter(torch.ones(2))
        optimizer = FusedAdamW([param, idle], backend=backend)
        loss = param.square().sum() + idle.square().sum()
        loss.backward(retain_graph=True)
        idle.grad = None
        version = idle._version
        optimizer.step()
        # What the graph saved is no more: to go on with it would give wrong gradients without a word.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert idle._version == version  # of which nothing was changed


# Groups.


def test_every_group_has_options_of_its_own(backend: str) -> None:
    params = make_params([(5,), (6,), (7,), (8,)])
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "betas": (0.5, 0.9)},
        {"eps": 1e-2, "weight_decay": 0.0, "amsgrad": True},
        {"maximize": True, "lr": Cosine(0.1, 20)},
        {"weight_decay": WSD(2, 3, 4, 0.5), "lr": Constant(0.02), "lr_scale": 0.5},
    ]
    groups = [{"params": [param], **option} for param, option in zip(params, options, strict=True)]
    reference = Float64AdamW([dict(group) for group in groups])
    optimizer = FusedAdamW(groups, backend=backend)
    step_both(optimizer, reference, steps=25)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("how", ["add_param_group", "append"])
def test_a_group_is_added_while_training(backend: str, how: str) -> None:
    params = make_params([(5,), (6,), (7,)])
    optimizer, reference = run_beside_torch(params[:1], backend, steps=4)
    late = Float64AdamW(params[1:], lr=0.5)
    group = {"params": params[1:], "lr": 0.5}
    if how == "append":
        optimizer.param_groups.append(group)  # as some libraries do
    else:
        optimizer.add_param_group(group)
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads[:1])
        late.step(grads[1:])
    assert_same_parameter(optimizer, params[0], reference, 0)
    assert_same_parameter(optimizer, params[1], late, 0)
    assert_same_parameter(optimizer, params[2], late, 1)


def test_groups_and_parameters_are_taken_away_while_training(backend: str) -> None:
    params = make_params([(5,), (6,), (7,)])
    optimizer = FusedAdamW([{"params": params[:2]}, {"params": params[2:]}], backend=backend)
    reference = Float64AdamW([{"params": params[:2]}, {"params": params[2:]}])
    step_both(optimizer, reference)
    kept = [param.detach().clone() for param in params]
    optimizer.param_groups.pop()
    optimizer.param_groups[0]["params"].pop(0)
    for _ in range(2):
        grads = make_grads(params)
        set_grads(params, grads)
        optimizer.step()
        reference.step([None, grads[1], None])
    assert torch.equal(params[0], kept[0])
    assert torch.equal(params[2], kept[2])
    assert_same_parameter(optimizer, params[1], reference, 1)


def test_named_parameters(backend: str) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer = FusedAdamW(module.named_parameters(), backend=backend)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    module(torch.ones(3)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


# What a step leaves behind: nothing.


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


OPTIONS: list[dict[str, Any]] = [
    {"lr": 1e-3},
    {"lr": WSD(3, 50, 50, 0.1), "max_grad_norm": 1.0, "skip_nonfinite": True, "amsgrad": True},
    {"lr": torch.tensor(0.1), "weight_decay": Cosine(0.1, 20)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["float", "schedule", "tensor"])
def test_a_step_allocates_nothing(options: dict[str, Any]) -> None:
    params = make_params([(40,), (3, 5), (), (0,)]) + make_params([(600,)], torch.bfloat16)
    optimizer = FusedAdamW(params, backend="native", **options)
    set_grads(params, make_grads(params))
    for _ in range(3):
        optimizer.step()
    with Count() as count:
        optimizer.step()
    assert count.operations == []  # not one operation of torch, thus not one tensor
    gc.collect()
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


def test_new_gradients_of_the_same_layout_need_no_operation_either() -> None:
    params = make_params([(40,), (3, 5)])
    optimizer = FusedAdamW(params, backend="native")
    rounds = [make_grads(params) for _ in range(4)]
    for grads in rounds:
        set_grads(params, grads)
        with Count() as count:
            optimizer.step()
    assert count.operations == []


def test_an_optimizer_is_freed_with_all_that_it_holds(backend: str) -> None:
    params = make_params([(5,), (6, 4)])
    optimizer, _ = run_beside_torch(params, backend, lr=Cosine(0.1, 10))

    params[0].owner = optimizer  # references back
    params[1].register_hook(lambda grad, owner=optimizer: None)
    held = [optimizer, *params, *(value for state in optimizer.state.values() for value in state.values())]
    graves = [weakref.ref(each) for each in held]
    del optimizer, params, held, _
    gc.collect()
    assert [grave() for grave in graves] == [None] * len(graves)


# Threads, and no compiled extension.


@pytest.mark.usefixtures("restored_threads")
def test_two_optimizers_on_two_threads(backend: str) -> None:
    torch.set_num_threads(2)
    start = [make_params([(40_000,), (7,)]) for _ in range(2)]
    rounds = [[make_grads(own) for _ in range(20)] for own in start]

    def train(which: int, found: dict[int, list[Tensor]]) -> None:
        own = copies(start[which])
        optimizer = FusedAdamW(own, lr=Cosine(0.1, 20), max_grad_norm=1.0, backend=backend)
        for grads in rounds[which]:
            set_grads(own, grads)
            optimizer.step()
        found[which] = snapshot(optimizer)

    expected: dict[int, list[Tensor]] = {}
    for which in range(2):
        train(which, expected)
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=train, args=(which, found)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(same_bits(expected[which], found[which]) for which in range(2))


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["nexus._native"] = None  # an import of it fails
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import nexus.optim
    from nexus.optim import FusedAdamW
    import torch
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.ones(3)
    optimizer = FusedAdamW([param], lr=0.5, weight_decay=0.0)
    optimizer.step()
    FusedAdamW([param], backend="reference")
(warning,) = caught
print(optimizer.backend, param.tolist())
print(warning.category.__name__, warning.message)
try:
    FusedAdamW([param], backend="native")
except RuntimeError as error:
    print(error)
"""


def test_without_the_extension_the_reference_runs_and_says_why_once() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_EXTENSION], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ran, warned, refused = result.stdout.splitlines()
    assert ran == "reference [-0.5, -0.5, -0.5]"
    assert warned.startswith("RuntimeWarning nexus runs its slow 'reference' backend")
    assert refused.startswith("backend='native' cannot run here")
    for line in (warned, refused):
        assert "the extension cannot be imported: import of nexus._native halted" in line
