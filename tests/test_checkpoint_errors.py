"""State dicts that do not fit: the entry is named, nothing is changed. And the hooks around loading and saving."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import make_grads, make_params, same_bits, set_grads, snapshot

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SHAPES = [(5,), (3, 4)]
SCHEDULE = WSD(3, 10, 5, 0.1)


def make(kind: type[torch.optim.Optimizer] = FusedAdamW, steps: int = 3, **options: Any) -> torch.optim.Optimizer:
    params = make_params(SHAPES)
    optimizer = kind([{"params": params[:1]}, {"params": params[1:]}], **options)
    for _ in range(steps):
        set_grads(params, make_grads(params))
        optimizer.step()
    return optimizer


def everything(optimizer: FusedAdamW) -> list[Any]:
    """Plain values beside the tensors of `snapshot`."""
    saved = optimizer.state_dict()["param_groups"]
    return [*copy.deepcopy(saved), int(optimizer.skipped_steps)]


def change(*keys: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    def apply(saved: dict[str, Any]) -> Any:
        inner: Any = saved
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value

    return apply


def drop(*keys: Any) -> Callable[[dict[str, Any]], Any]:
    def apply(saved: dict[str, Any]) -> Any:
        inner: Any = saved
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]

    return apply


GROUP1 = ("param_groups", 1)
WHERE = r"param_groups\[1\] of the loaded state dict"
STATE1 = r"state\[1\] of the loaded state dict"
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no groups": (drop("param_groups"), "not an optimizer's state dict.*'param_groups'"),
    "no state": (drop("state"), "not an optimizer's state dict.*'state'"),
    "groups of another type": (change("param_groups", value=3), "not an optimizer's state dict"),
    "too few groups": (drop("param_groups", 1), "has 1 parameter groups, this optimizer 2"),
    "too many parameters": (change(*GROUP1, "params", value=[1, 2]), "has 2 parameters, that of this optimizer 1"),
    "no parameters": (drop(*GROUP1, "params"), f"{WHERE} must be a dict with 'params'"),
    "a group that is none": (change(*GROUP1, value="group"), f"{WHERE} must be a dict with 'params'"),
    "no betas": (drop(*GROUP1, "betas"), f"{WHERE} is not AdamW's"),
    "lr": (change(*GROUP1, "lr", value=-1.0), f"{WHERE}: lr must be a finite number >= 0, got -1.0"),
    "lr nan": (change(*GROUP1, "lr", value=math.nan), f"{WHERE}: lr must be"),
    "lr text": (change(*GROUP1, "lr", value="fast"), f"{WHERE}: lr must be"),
    "lr tensor": (change(*GROUP1, "lr", value=torch.ones(2)), f"{WHERE}: lr as a tensor must have one element"),
    "betas": (change(*GROUP1, "betas", value=(0.9, 1.5)), rf"{WHERE}: betas\[1\] must be"),
    "amsgrad": (change(*GROUP1, "amsgrad", value="yes"), f"{WHERE}: amsgrad must be a bool"),
    "amsgrad without its moment": (change(*GROUP1, "amsgrad", value=True), f"{STATE1} must have .*max_exp_avg_sq"),
    "shape": (
        change("state", 1, "exp_avg", value=torch.zeros(4, 3)),
        rf"{STATE1}: exp_avg must be .*\(3, 4\), got \(4, 3\)",
    ),
    "maximum's shape": (
        change("state", 1, "max_exp_avg_sq", value=torch.zeros(7)),
        rf"{STATE1}: max_exp_avg_sq must be of shape \(3, 4\), got \(7,\)",
    ),
    "moment of no tensor": (change("state", 1, "exp_avg_sq", value=[0.0]), f"{STATE1}: exp_avg_sq must .*got list"),
    "moment of integers": (
        change("state", 1, "exp_avg", value=torch.zeros(3, 4, dtype=torch.int32)),
        f"{STATE1}: exp_avg must be .*floating point, got torch.int32",
    ),
    "moment that is sparse": (
        change("state", 1, "exp_avg", value=torch.zeros(3, 4).to_sparse()),
        f"{STATE1}: exp_avg must be dense.*sparse_coo",
    ),
    "moment on meta": (
        change("state", 1, "exp_avg", value=torch.zeros(3, 4, device="meta")),
        f"{STATE1}: exp_avg must be",
    ),
    "no moment": (drop("state", 1, "exp_avg_sq"), f"{STATE1} must have step, exp_avg, exp_avg_sq, got"),
    "no step": (drop("state", 1, "step"), f"{STATE1} must have step"),
    "negative step": (change("state", 1, "step", value=torch.tensor(-1.0)), f"{STATE1}: step must be from 0"),
    "step nan": (change("state", 1, "step", value=torch.tensor(math.nan)), f"{STATE1}: step must be from 0"),
    "step text": (change("state", 1, "step", value="three"), f"{STATE1}: step must be from 0 .*got 'three'"),
    "two steps": (change("state", 1, "step", value=torch.ones(2)), f"{STATE1}: step must have one element"),
    "state of a list": (change("state", 1, value=[1, 2]), f"{STATE1} must have"),
    "state of a tensor": (change("state", 1, value=torch.ones(3)), f"{STATE1} must have"),
    "schedule of text": (
        change(*GROUP1, "lr_schedule", value="WSD"),
        "lr_schedule of the loaded state dict must be a dict",
    ),
    "schedule's step": (
        change(*GROUP1, "lr_schedule", "step", value=-1),
        r"lr_schedule\['step'\].* must be an int from 0",
    ),
    "edits of text": (change(*GROUP1, "lr_schedule", "edits", value="x"), r"lr_schedule\['edits'\].*must be"),
    "edits": (
        change(*GROUP1, "lr_schedule", "edits", value={"foo": 1}),
        r"lr_schedule\['edits'\].*must be.*decay_start",
    ),
    "edited start": (
        change(*GROUP1, "lr_schedule", "edits", value={"decay_start": 1.5, "decay_from": 1.0}),
        "decay_start in .*must be an int",
    ),
    "edited rate": (
        change(*GROUP1, "lr_schedule", "edits", value={"decay_start": 1, "decay_from": math.nan}),
        "decay_from in .*must be a finite number",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=list(BAD))
def test_a_dict_that_does_not_fit_is_named_and_changes_nothing(
    backend: str, spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    optimizer = make(lr=SCHEDULE, weight_decay=0.3, backend=backend)
    saved = copy.deepcopy(make(lr=SCHEDULE, weight_decay=0.1, steps=7).state_dict())
    spoil(saved)
    before, settings = snapshot(optimizer), everything(optimizer)
    with pytest.raises((TypeError, ValueError), match=words):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer))
    assert settings == everything(optimizer)
    set_grads([group["params"][0] for group in optimizer.param_groups], make_grads(make_params(SHAPES)))
    optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(3))


@pytest.mark.parametrize("spoil", [None, 3, [], "state"])
def test_something_else_than_a_dict(spoil: Any) -> None:
    optimizer = make()
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        optimizer.load_state_dict(spoil)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.Adagrad])
@pytest.mark.parametrize("steps", [0, 3])
def test_another_optimizers_state_is_refused(backend: str, kind: type[torch.optim.Optimizer], steps: int) -> None:
    optimizer = make(backend=backend)
    before, settings = snapshot(optimizer), everything(optimizer)
    with pytest.raises(ValueError, match=r"param_groups\[0\] of the loaded state dict is not AdamW's: it has"):
        optimizer.load_state_dict(make(kind, steps=steps, lr=0.1).state_dict())
    assert same_bits(before, snapshot(optimizer))
    assert settings == everything(optimizer)


def test_what_else_a_state_dict_holds_is_kept(backend: str) -> None:
    optimizer = make(backend=backend)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["initial_lr"] = 0.7  # of a scheduler
    saved["param_groups"][0]["note"] = "mine"
    saved["state"]["extra"] = {"mine": 1}
    saved["state"][0]["ema"] = torch.ones(5)
    fresh = make(steps=0, backend=backend)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["initial_lr"] == 0.7
    assert fresh.param_groups[0]["note"] == "mine"
    assert fresh.state["extra"] == {"mine": 1}
    assert fresh.state[fresh.param_groups[0]["params"][0]]["ema"].sum() == 5
    for option in ("foreach", "fused", "capturable", "differentiable"):
        assert option not in fresh.param_groups[0]


# Hooks.


def test_state_dict_hooks(backend: str) -> None:
    optimizer = make(backend=backend)
    calls: list[str] = []

    def before(each: torch.optim.Optimizer) -> None:
        assert each is optimizer
        calls.append("before")

    def after(each: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("after")
        return {**saved, "mine": 1}

    handles = [optimizer.register_state_dict_pre_hook(before), optimizer.register_state_dict_post_hook(after)]
    assert optimizer.state_dict()["mine"] == 1
    assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    assert "mine" not in optimizer.state_dict()


def test_load_state_dict_hooks(backend: str) -> None:
    optimizer = make(backend=backend)
    saved = optimizer.state_dict()
    calls: list[str] = []

    def before(each: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        return {**state_dict, "param_groups": [{**group, "lr": 0.7} for group in state_dict["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda each: calls.append("after"))
    optimizer.load_state_dict(saved)
    assert calls == ["before", "after"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
    assert [group["lr"] for group in saved["param_groups"]] == [1e-3, 1e-3]
