"""Updates in the backward pass: what they leave to `optimizer.step()`, and what each of them costs."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from cuda_on_cpu import NAME
from cuda_shim.controls import Shim
from references import same_bits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nexus.backends import triton
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Cosine
from nexus.training import StepInBackward, step_in_backward

LAUNCH_FAILURE = 719
RATES = (WSD(warmup_steps=3, stable_steps=4, decay_steps=8, peak_lr=0.5), Cosine(peak_lr=0.25, total_steps=12))


def make(backend: str, count: int = 1) -> tuple[nn.ParameterList, FusedAdamW]:
    """Float64 zeros in two groups: where each gradient is 1, an update subtracts the group's rate."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2 * count)])
    groups = [
        {"params": [*model[:count]], "lr": RATES[0]},
        {"params": [*model[count:]], "lr": RATES[1], "lr_scale": 0.5},
    ]
    return model, FusedAdamW(groups, weight_decay=0.0, eps=0.0, backend=backend)


def rates(step: int) -> tuple[float, float]:
    return RATES[0](step), 0.5 * RATES[1](step)


def counts(optimizer: FusedAdamW) -> tuple[int, int]:
    (state,) = engine_of(optimizer).states.values()
    return int(state.completed), int(optimizer.skipped_steps)


def check_counts_and_rates(backend: str) -> None:
    model, optimizer = make(backend, 2)
    expected = [0.0, 0.0]
    with step_in_backward(model, optimizer):
        for step, order in enumerate(itertools.islice(itertools.permutations(range(4)), 0, None, 2)):
            expected = [sum - rate for sum, rate in zip(expected, rates(step), strict=True)]
            for index in order:
                model[index].sum().backward()
                assert model[index].grad is None
                assert model[index].tolist() == pytest.approx([expected[index // 2]] * 3, rel=1e-12)
                assert counts(optimizer) == (step, 0)
                shown = optimizer.param_groups[index // 2]["lr"]
                assert float(shown) == pytest.approx(rates(step)[index // 2], rel=1e-15, abs=1e-18)
            optimizer.step()
            assert counts(optimizer) == (step + 1, 0)


def test_counts_advance_once_a_step_in_any_order(backend: str) -> None:
    check_counts_and_rates(backend)


def test_counts_advance_once_a_step_in_triton(where_triton_runs: str) -> None:
    check_counts_and_rates("triton")


class Counted:
    """Triton's kernels, of which each launch leaves a name."""

    def __init__(self, kernels: Any, names: list[str]) -> None:
        self.kernels, self.names = kernels, names

    def __getattr__(self, name: str) -> Any:
        self.names.append(name)
        return getattr(self.kernels, name)


def test_rates_are_evaluated_once_for_all_updates_in_triton(
    where_triton_runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    launching = triton._launching

    @contextlib.contextmanager
    def counted(device: torch.device) -> Iterator[Any]:
        with launching(device) as kernels:
            yield Counted(kernels, names)

    monkeypatch.setattr(triton, "_launching", counted)
    (plain, plain_optimizer), (ours, optimizer) = make("triton", 2), make("triton", 2)
    step_in_backward(ours, optimizer)
    for step in range(4):
        names.clear()
        for param in ours:
            (param.sum() * (1.0 + step)).backward()
        assert step == 0 or names == ["prologue", *["update"] * 4]
        optimizer.step()
        (sum(param.sum() for param in plain) * (1.0 + step)).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert same_bits([*plain], [*ours])


def test_counts_that_are_elsewhere_are_followed(backend: str) -> None:
    """As after the model has been on another device for a while, where a parameter had no gradient."""
    (plain, plain_optimizer), (ours, optimizer) = make(backend), make(backend)
    with step_in_backward(ours, optimizer):
        for step in range(6):
            if step == 3:
                engine = engine_of(optimizer)
                engine.states = {device: copy.deepcopy(state) for device, state in engine.states.items()}
                engine.forget_plan()
            for model, each in ((plain, plain_optimizer), (ours, optimizer)):
                sum(param.sum() for param in model).backward()
                each.step()
                each.zero_grad()
    assert same_bits([*plain], [*ours])


def test_a_rate_that_another_groups_schedule_writes(backend: str) -> None:
    """Whichever of the groups is updated first."""
    (plain, plain_optimizer), (ours, optimizer) = make(backend, 2), make(backend, 2)
    changes = {
        0: lambda groups: groups[1].update(lr=groups[0]["lr"], lr_schedule=None, lr_scale=1.0),
        3: lambda groups: groups[0].update(lr_scale=2.0),
        5: lambda groups: groups[0].update(lr=Cosine(peak_lr=0.5, total_steps=9)),
        7: lambda groups: groups[0].update(lr=0.25, lr_schedule=None, lr_scale=1.0),
    }
    with step_in_backward(ours, optimizer):
        for step in range(9):
            for model, each in ((plain, plain_optimizer), (ours, optimizer)):
                changes.get(step, lambda groups: None)(each.param_groups)
                for index in (3, 0, 1, 2):
                    model[index].sum().backward()
                each.step()
                each.zero_grad()
            assert same_bits([*plain], [*ours])


class Operations(TorchDispatchMode):
    """Lists what torch itself is asked to run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def run_hooks(params: Iterable[nn.Parameter], grads: Iterable[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
        for hook in param._post_accumulate_grad_hooks.values():
            hook(param)


def launches_of_hooks(gpu: Shim, params: Iterable[nn.Parameter], grads: Iterable[Tensor]) -> list[str]:
    gpu.reset()
    run_hooks(params, grads)
    return [launch.kernel for launch in gpu.launches()]


@pytest.mark.parametrize("count", [1, 5])
def test_launches_of_an_update(gpu: Shim, count: int) -> None:
    """None is a copy."""
    model, optimizer = make(NAME, count)
    step_in_backward(model, optimizer)
    first, second = ([torch.ones_like(param) for param in model] for _ in range(2))
    launches_of_hooks(gpu, model, first)
    optimizer.step()
    for grads in (first, second):  # the same, and others elsewhere
        with Operations() as operations:
            assert launches_of_hooks(gpu, model, grads) == ["prepare"] + ["update_tensors"] * len(model)
        assert operations.names == []
        gpu.reset()
        optimizer.step()
        assert [launch.kernel for launch in gpu.launches()] == ["prepare", "update_tensors"]


def test_a_rate_that_is_written_is_uploaded_once(gpu: Shim) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(4)])
    optimizer = FusedAdamW(model.parameters(), lr=0.5, weight_decay=0.0, eps=0.0, backend=NAME)
    step_in_backward(model, optimizer)
    for step, lr in enumerate((0.5, 0.25, 0.125)):
        optimizer.param_groups[0]["lr"] = lr
        launches = launches_of_hooks(gpu, model, [torch.ones_like(param) for param in model])
        assert step == 0 or launches == ["store", "prepare"] + ["update_tensors"] * len(model)
        optimizer.step()
    assert [param.tolist() for param in model] == [pytest.approx([-0.875] * 3, rel=1e-12)] * len(model)


def test_a_setting_that_is_written_in_mid_update_is_used_from_there_on(backend: str) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(4)])
    optimizer = FusedAdamW(model.parameters(), lr=0.5, weight_decay=0.0, eps=0.0, backend=backend)
    step_in_backward(model, optimizer)
    for lr in (0.5, 0.25, 0.125):
        model[0].sum().backward()
        optimizer.param_groups[0]["lr"] = lr
        for param in model[1:]:
            param.sum().backward()
        optimizer.step()
    expected = [-0.5 - 0.5 - 0.25, *[-0.875] * 3]
    assert [param.tolist() for param in model] == [pytest.approx([each] * 3, rel=1e-12) for each in expected]


def on_another_stream(gpu: Shim, handle: StepInBackward, optimizer: FusedAdamW) -> None:
    for part in [*handle._parts.values()][2:]:
        if part.runner is not None:
            vars(part.runner)["stream"] = gpu.stream()


def in_another_plan(gpu: Shim, handle: StepInBackward, optimizer: FusedAdamW) -> None:
    engine_of(optimizer).prepare(vars(optimizer))


@pytest.mark.parametrize("disturb", [on_another_stream, in_another_plan])
def test_where_the_common_prologue_does_not_serve_each_update_has_its_own(gpu: Shim, disturb: Any) -> None:
    (plain, plain_optimizer), (ours, optimizer) = make(NAME, 2), make(NAME, 2)
    handle = step_in_backward(ours, optimizer)
    for step in range(4):
        grads = [torch.full_like(param, 1.0 + step) for param in ours]
        first = launches_of_hooks(gpu, ours[:2], grads[:2])
        disturb(gpu, handle, optimizer)
        second = launches_of_hooks(gpu, ours[2:], grads[2:])
        assert step == 0 or (first.count("prepare"), second.count("prepare")) == (1, 2)
        optimizer.step()
        for param, grad in zip(plain, grads, strict=True):
            param.grad = grad
        plain_optimizer.step()
    assert same_bits([*plain], [*ours])


@pytest.mark.parametrize("nth", [1, 2, 3], ids=["the prologue", "the first update", "the second update"])
def test_a_launch_that_fails_changes_nothing_and_may_come_again(gpu: Shim, nth: int) -> None:
    (plain, plain_optimizer), (ours, optimizer) = make(NAME), make(NAME)
    step_in_backward(ours, optimizer)
    for step in range(4):
        for index, param in enumerate(ours):
            grad = plain[index].grad = torch.full_like(param, 1.0 + step + index)
            if step == 2 and index == nth // 3:
                before = param.detach().clone()
                gpu.fail(LAUNCH_FAILURE, nth - 2 * index)
                with pytest.raises(RuntimeError, match="the prologue" if nth == 1 else "the update"):
                    run_hooks([param], [grad])
                assert torch.equal(param, before)
                assert param.grad is not None
            run_hooks([param], [grad])
        plain_optimizer.step()
        optimizer.step()
    assert same_bits([*plain], [*ours])
