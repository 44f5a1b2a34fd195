"""What users do to an optimizer, as torch lets them: closures, groups, state, clipping, saving it."""

from __future__ import annotations

import collections
import io
from collections.abc import Callable, Sequence
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

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine

SHAPES = [(5,), (3, 4)]


# Closures and hooks.


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("returned", [None, 2.5, "loss"])
def test_a_closure_may_return_anything_and_run_under_any_mode(
    backend: str, returned: Any, mode: Callable[[], Any]
) -> None:
    params = make_params(SHAPES)
    optimizer, reference = (
        FusedAdamW(params, lr=Cosine(0.1, 9), backend=backend),
        Float64AdamW(params, lr=Cosine(0.1, 9)),
    )
    for _ in range(3):
        grads = make_grads(params)

        @mode()
        def closure(grads: list[Tensor] = grads) -> Any:
            optimizer.zero_grad()
            set_grads(params, [grad.clone() for grad in grads])
            return returned

        assert optimizer.step(closure) == returned
        reference.step(grads)
    assert optimizer.step(closure=closure) == returned
    reference.step(grads)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("where", ["pre-hook", "closure", "post-hook"])
def test_what_a_hook_or_a_closure_changes_is_in_force_at_once(backend: str, where: str) -> None:
    params = make_params(SHAPES)
    optimizer, reference = run_beside_torch(params, backend)
    changes: list[dict[str, Any]] = [
        {"lr": 0.1},
        {"betas": (0.5, 0.7)},
        {"weight_decay": 0.4},
        {"eps": 0.1},
        {"lr": 0.2},
    ]
    for change in changes:
        grads = make_grads(params)

        def apply(*_: Any, change: dict[str, Any] = change, grads: list[Tensor] = grads) -> None:
            optimizer.param_groups[0].update(change)
            if where != "post-hook":
                set_grads(params, [grad * 2 for grad in grads])

        set_grads(params, grads)
        if where == "post-hook":
            reference.step(grads)
        reference.optimizer.param_groups[0].update(change)
        if where != "post-hook":
            reference.step([grad * 2 for grad in grads])
        if where == "closure":
            optimizer.step(apply)
            continue
        register = optimizer.register_step_pre_hook if where == "pre-hook" else optimizer.register_step_post_hook
        handle = register(apply)
        optimizer.step()
        handle.remove()
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


def test_what_it_prints_and_its_defaults_are_torchs_and_more(backend: str) -> None:
    params = make_params(SHAPES)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5, "betas": (0.8, 0.9)}]
    optimizer, plain = FusedAdamW(groups, backend=backend), torch.optim.AdamW(groups)
    of_torch_alone = ("capturable", "decoupled_weight_decay", "differentiable", "foreach", "fused")
    lines = [line for line in repr(plain).splitlines() if not line.strip().startswith(of_torch_alone)]
    assert lines[0] == "AdamW ("
    shown = repr(optimizer).splitlines()
    assert shown[0] == "FusedAdamW ("
    remaining = iter(shown[1:])
    assert all(line in remaining for line in lines[1:])  # in this order
    assert {key: optimizer.defaults[key] for key in plain.defaults if key not in of_torch_alone} == {
        key: value for key, value in plain.defaults.items() if key not in of_torch_alone
    }


def test_a_step_of_a_subclass_is_wrapped_as_torch_wraps_it(backend: str) -> None:
    class Counted(FusedAdamW):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            self.calls += 1
            return super().step(closure)

    class Profiled(FusedAdamW):
        @torch.optim.Optimizer.profile_hook_step
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    for kind in (Counted, Profiled):
        params = make_params(SHAPES)
        optimizer, reference = kind(params, backend=backend), Float64AdamW(params)
        seen: list[Any] = []
        handle = optimizer.register_step_post_hook(lambda each, *_, seen=seen: seen.append(each))
        step_both(optimizer, reference)
        assert len(seen) >= 3
        handle.remove()
        with torch.profiler.profile() as profile:
            step_both(optimizer, reference)
        ranges = {
            event.key: event.count for event in profile.key_averages() if event.key.startswith("Optimizer.step#")
        }
        assert ranges[f"Optimizer.step#{kind.__name__}.step"] >= 3
        assert_same_run(optimizer, reference)


# Groups and state that are edited in place.


@pytest.mark.parametrize("how", ["append", "replace", "slice", "new list", "reorder"])
def test_the_parameters_of_a_group_are_edited(backend: str, how: str) -> None:
    params = make_params([(5,), (3, 4), (7,)])
    first, second, late = params
    optimizer, reference = run_beside_torch([first, second], backend)
    fresh = Float64AdamW([late], lr=1e-2)
    group = optimizer.param_groups[0]
    if how == "append":
        group["params"].append(late)
    elif how == "replace":
        group["params"][0] = late
    elif how == "slice":
        group["params"][:] = [second, late]
    elif how == "new list":
        group["params"] = [late, second]
    else:
        group["params"].reverse()
    kept = group["params"]
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, grads)
        optimizer.step()
        reference.step([grads[0] if any(first is p for p in kept) else None, grads[1]])
        fresh.step(grads[2:])
    for index, param in enumerate((first, second)):
        assert_same_parameter(optimizer, param, reference, index)
    if how != "reorder":
        assert_same_parameter(optimizer, late, fresh, 0)


def reset_one(optimizer: FusedAdamW, params: Sequence[Tensor]) -> None:
    optimizer.state[params[0]] = {}


def delete_one(optimizer: FusedAdamW, params: Sequence[Tensor]) -> None:
    del optimizer.state[params[0]]


def clear_one(optimizer: FusedAdamW, params: Sequence[Tensor]) -> None:
    optimizer.state[params[0]].clear()


def replace_all(optimizer: FusedAdamW, params: Sequence[Tensor]) -> None:
    optimizer.state = collections.defaultdict(dict, {params[1]: optimizer.state[params[1]]})


def by_setstate(optimizer: FusedAdamW, params: Sequence[Tensor]) -> None:
    optimizer.__setstate__({"state": collections.defaultdict(dict, {params[1]: optimizer.state[params[1]]})})


@pytest.mark.parametrize("reset", [reset_one, delete_one, clear_one, replace_all, by_setstate])
def test_state_that_is_reset_begins_anew(backend: str, reset: Callable[[Any, Any], None]) -> None:
    params = make_params(SHAPES)
    optimizer, reference = run_beside_torch(params, backend)
    old = dict(optimizer.state[params[0]])
    kept = {name: value.clone() for name, value in old.items()}
    reset(optimizer, params)
    fresh = Float64AdamW(params[:1], lr=1e-2)
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
        fresh.step(grads[:1])
    assert_same_parameter(optimizer, params[0], fresh, 0)
    assert_same_parameter(optimizer, params[1], reference, 1)
    assert all(torch.equal(old[name], kept[name]) for name in old)  # nothing was written to what is gone


def test_state_of_a_parameter_that_is_in_no_group_is_named_when_saving(backend: str) -> None:
    params = make_params(SHAPES)
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


# The optimizer itself in a file, with its model.


@pytest.mark.parametrize("lr", [0.01, WSD(2, None, 5, 0.1)], ids=["float", "schedule"])
def test_an_optimizer_that_is_saved_whole_goes_on_with_its_model(backend: str, lr: Any) -> None:
    module = torch.nn.Linear(3, 4)
    params = list(module.parameters())
    optimizer = FusedAdamW(params, lr=lr, max_grad_norm=1.0, backend=backend)
    reference = Float64AdamW(params, lr=lr, max_grad_norm=1.0)
    step_both(optimizer, reference, steps=4)
    optimizer.register_step_post_hook(print)
    file = io.BytesIO()
    torch.save({"model": module, "optimizer": optimizer}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    assert all(
        a is b for a, b in zip(saved["model"].parameters(), saved["optimizer"].param_groups[0]["params"], strict=True)
    )
    assert not saved["optimizer"]._optimizer_step_post_hooks  # torch leaves them out, too
    before = snapshot(optimizer)
    assert same_bits(before, snapshot(saved["optimizer"]))
    step_both(saved["optimizer"], reference)
    assert_same_run(saved["optimizer"], reference)
    assert same_bits(before, snapshot(optimizer))


# Clipping by torch's own functions.


def clip_pieces(params: list[Tensor]) -> None:
    grads = [param.grad for param in params if param.grad is not None]
    torch.nn.utils.clip_grads_with_norm_(params, 0.7, torch.nn.utils.get_total_norm(grads))


CLIPS: dict[str, Callable[[list[Tensor]], Any]] = {
    "norm": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.7),
    "norm, in a loop": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.7, foreach=False),
    "largest": lambda params: torch.nn.utils.clip_grad_norm_(params, 0.1, norm_type=torch.inf),
    "value": lambda params: torch.nn.utils.clip_grad_value_(params, 0.3),
    "in two calls": clip_pieces,
}


@pytest.mark.parametrize("clip", CLIPS.values(), ids=list(CLIPS))
def test_gradients_clipped_by_torch(backend: str, clip: Callable[[list[Tensor]], Any]) -> None:
    params = make_params([*SHAPES, (2,)])
    optimizer = FusedAdamW(params, lr=1e-2, max_grad_norm=torch.inf, backend=backend)
    reference = Float64AdamW(params, lr=1e-2)
    for _ in range(4):
        grads: list[Any] = [*make_grads(params)[:2], None]
        set_grads(params, grads)
        norm = torch.stack([grad.norm() for grad in grads[:2]]).norm()
        clip(params)
        reference.step([param.grad for param in params])
        optimizer.step()
        assert float(optimizer.grad_norm) < 0.95 * norm  # what it sees is clipped
    assert_same_run(optimizer, reference)
