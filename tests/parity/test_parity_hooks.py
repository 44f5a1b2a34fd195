"""Hooks, closures, printing: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from side_by_side import Make, both, outcomes, param, params_of, same_of_both, state_of, train
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.logging_tensor import capture_logs_with_logging_tensor_mode

from nexus.optim.storage import STORAGE_DEFAULTS

THEME = "Hooks, closures, printing"


@pytest.mark.parity(
    "`step(closure)` under `no_grad`",
    torch="the closure is called once, with gradients, before the update; its loss is returned, else `None`",
    also=("test_hooks.py::test_a_closure_may_return_anything_and_run_under_any_mode",),
)
@pytest.mark.parity(
    "`zero_grad()` and `zero_grad(set_to_none=False)`", torch="gradients are gone; gradients are zeros, in place"
)
@same_of_both
def test_closures_and_zero_grad(make: Make) -> object:
    own = param(3)
    optimizer = make([own], lr=0.1)
    seen: list[Any] = []

    def closure() -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), own.tolist()))
        optimizer.zero_grad()
        loss = own.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
    assert seen == [(True, [1.0] * 3)]
    grad = own.grad
    optimizer.zero_grad(set_to_none=False)
    assert own.grad is grad
    assert not grad.any()
    assert optimizer.step() is None  # which counts, and decays
    optimizer.zero_grad()
    assert own.grad is None
    optimizer.step()  # which does not
    assert int(state_of(optimizer)["step"]) == 2
    return optimizer


@pytest.mark.parity(
    "step hooks, of the optimizer and of all optimizers",
    torch="run before and after the update: those of all optimizers, its own, the update, its own, those of all",
)
@same_of_both
def test_step_hooks(make: Make) -> object:
    own = param(2)
    optimizer = make([own], lr=0.1)
    own.grad = torch.ones_like(own)
    calls: list[tuple[str, bool]] = []

    def hook(name: str) -> Any:
        return lambda each, args, kwargs: calls.append((name, own[0].item() < 1)) if each is optimizer else None

    handles = [
        optimizer.register_step_post_hook(hook("own after")),
        optimizer.register_step_pre_hook(hook("own before")),
        register_optimizer_step_post_hook(hook("all after")),
        register_optimizer_step_pre_hook(hook("all before")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    optimizer.register_step_pre_hook(lambda each, args, kwargs: ((each, lambda: 7.0), {}))
    assert optimizer.step() == 7.0  # the closure's
    assert calls == [("all before", False), ("own before", False), ("own after", True), ("all after", True)]
    return optimizer


@pytest.mark.parity(
    "the range of a step in the profiler",
    torch="`Optimizer.step#AdamW.step`",
    nexus="`Optimizer.step#FusedAdamW.step`",
    why="it is the class's name",
    also=("test_hooks.py::test_a_step_of_a_subclass_is_wrapped_as_torch_wraps_it",),
)
@outcomes(torch=[("Optimizer.step#AdamW.step", 2)], nexus=[("Optimizer.step#FusedAdamW.step", 2)])
def test_the_range_in_the_profiler(make: Make) -> object:
    optimizer = make([param(2)])
    with torch.profiler.profile() as profile:
        train(optimizer, steps=2)
    return [(each.key, each.count) for each in profile.key_averages() if each.key.startswith("Optimizer.step")]


@pytest.mark.parity(
    "`repr`",
    torch="the class's name, and a line for each option of each group, in order of the alphabet",
    nexus="same, with its own options",
    why="those of torch's implementations are not there",
)
@pytest.mark.parity(
    "Parameter groups",
    "the keys of a group",
    torch="also `foreach, capturable, differentiable, fused, decoupled_weight_decay`",
    nexus="also `max_grad_norm, lr_scale, lr_schedule, weight_decay_schedule, master_weight_bits, exp_avg_dtype, "
    "exp_avg_sq_dtype, stochastic_rounding, average, bias_correction`, and none of those",
    why="they choose among torch's implementations, of which there is none here",
)
def test_repr_and_the_keys_of_a_group(request: pytest.FixtureRequest) -> None:
    both_of = both(lambda make: make([param(1)], lr=0.25))
    for name, optimizer in zip(("AdamW", "FusedAdamW"), both_of, strict=True):
        (group,) = optimizer.param_groups
        options = [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        assert repr(optimizer).splitlines() == [f"{name} (", "Parameter Group 0", *options, ")"]
    first, second = (set(optimizer.param_groups[0]) for optimizer in both_of)
    assert first - second == {"foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
    own = {"max_grad_norm", "lr_scale", "lr_schedule", "weight_decay_schedule", "bias_correction", *STORAGE_DEFAULTS}
    assert second - first == own
    said = next(mark.kwargs["nexus"] for mark in request.node.iter_markers("parity") if "keys" in mark.args[-1])
    assert set(said.split("`")[1].split(", ")) == own


@pytest.mark.parity(
    "what a `TorchDispatchMode` sees of a step",
    torch="`aten::_fused_adamw_` and what counts the steps",
    nexus="nothing: no operator of torch runs",
    why="the kernels are called directly, which is where the time of small updates goes",
    also=("test_memory.py::test_a_step_allocates_nothing",),
)
@outcomes(torch=(True, True), nexus=(False, False))
def test_what_a_dispatch_mode_sees(make: Make) -> object:
    optimizer = make([param(3)])
    train(optimizer, 1)
    before = params_of(optimizer)[0].tolist()
    with capture_logs_with_logging_tensor_mode() as seen:
        optimizer.step()
    assert params_of(optimizer)[0].tolist() != before
    return any("aten._fused_adamw_.default" in each for each in seen), bool(seen)
