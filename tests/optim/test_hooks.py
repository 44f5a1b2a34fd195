"""Closures, hooks, subclasses, autograd: what runs around an update and within one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import (
    assert_same_run,
    make_grads,
    make_params,
    run_beside_torch,
    set_grads,
    step_both,
)
from side_by_side import train
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import Cosine

SHAPES = [(5,), (3, 4)]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("returned", [None, 2.5, "loss"])
def test_a_closure_may_return_anything_and_run_under_any_mode(
    backend: str, returned: Any, mode: Callable[[], Any]
) -> None:
    params = make_params(SHAPES)
    optimizer, reference = run_beside_torch(params, backend, steps=0, lr=Cosine(peak_lr=0.1, total_steps=9))
    grads = make_grads(params)

    @mode()
    def closure() -> Any:
        optimizer.zero_grad()
        set_grads(params, [grad.clone() for grad in grads])
        return returned

    for _ in range(3):
        grads = make_grads(params)
        assert optimizer.step(closure) == returned
        reference.step(grads)
    assert optimizer.step(closure=closure) == returned
    reference.step(grads)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("where", ["pre-hook", "closure", "post-hook"])
def test_what_a_hook_or_a_closure_changes_is_in_force_at_once(backend: str, where: str) -> None:
    params = make_params(SHAPES)
    optimizer, reference = run_beside_torch(params, backend)
    registers = {"pre-hook": optimizer.register_step_pre_hook, "post-hook": optimizer.register_step_post_hook}
    change: dict[str, Any] = {}
    first, second = make_grads(params), make_grads(params)

    def apply(*_: Any) -> None:
        optimizer.param_groups[0].update(change)
        set_grads(params, second)

    handle = registers[where](apply) if where in registers else None
    for change in ({"lr": 0.1}, {"betas": (0.5, 0.7)}, {"weight_decay": 0.4}, {"eps": 0.1}, {"lr": 0.2}):
        first, second = make_grads(params), make_grads(params)
        set_grads(params, first)
        optimizer.step(apply if where == "closure" else None)
        if where == "post-hook":
            reference.step(first)
        reference.optimizer.param_groups[0].update(change)
        if where != "post-hook":
            reference.step(second)
    if handle is not None:
        handle.remove()
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


def test_a_pre_hook_may_change_the_arguments() -> None:
    optimizer = FusedAdamW(make_params([(3,)]))
    optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


def counted() -> type[FusedAdamW]:
    """Made anew for each test: torch wraps `step` of a class once, when it makes the first of its optimizers."""

    class Counted(FusedAdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Counted


def profiled() -> type[FusedAdamW]:
    class Profiled(FusedAdamW):
        @torch.optim.Optimizer.profile_hook_step
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    return Profiled


@pytest.mark.parametrize(
    ("make_class", "changes_class", "wraps"),
    [(counted, False, 1), (counted, True, 1), (profiled, False, 2), (profiled, True, 1)],
)
def test_a_step_of_a_subclass_is_wrapped_as_torch_wraps_it(
    make_class: Callable[[], type[FusedAdamW]], changes_class: bool, wraps: int
) -> None:
    kind = make_class()
    optimizer = (FusedAdamW if changes_class else kind)(make_params([(3,)]))
    optimizer.__class__ = kind  # as detectron2 does
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    with torch.profiler.profile(acc_events=True) as profile:  # without it, torch 2.10 warns
        train(optimizer, 3)
    ranges = {event.key: event.count for event in profile.key_averages()}
    assert seen == [*["before"] * wraps, *["after"] * wraps] * 3
    assert ranges[f"Optimizer.step#{kind.__name__}.step"] >= 3


def test_a_step_within_backward(backend: str) -> None:
    pairs = {param: run_beside_torch([param], backend, steps=0) for param in make_params([(3,), (4,)])}

    def step(param: Tensor) -> None:
        pairs[param][0].step()
        pairs[param][0].zero_grad()

    for param in pairs:
        param.register_post_accumulate_grad_hook(step)
    first, second = pairs
    for _ in range(3):
        grads = [2 * first.detach(), 3 * second.detach().square()]
        (first.square().sum() + second.pow(3).sum()).backward()
        for (_, reference), grad in zip(pairs.values(), grads, strict=True):
            reference.step([grad])
    for param, (optimizer, reference) in pairs.items():
        assert param.grad is None
        assert_same_run(optimizer, reference)


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
