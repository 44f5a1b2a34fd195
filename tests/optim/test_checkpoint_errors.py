"""State dicts that do not fit: the entry is named, nothing is changed. And the hooks around loading and saving."""

from __future__ import annotations

import copy
import io
import math
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from references import copies, make_grads, make_params, same_bits, set_grads, snapshot

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
    """Plain values beside the tensors of `snapshot`: groups, schedules and their counters, and torch's generator."""
    saved = optimizer.state_dict()
    plain = copy.deepcopy(saved["param_groups"])
    return [*plain, list(saved["state"]), int(optimizer.skipped_steps), torch.get_rng_state().tolist()]


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
SCHEDULE1 = (*GROUP1, "lr_schedule")
WHERE = r"param_groups\[1\] of the loaded state dict"
STATE1 = r"state\[1\] of the loaded state dict"
STEP1 = rf"{WHERE}: lr_schedule\['step'\]"
BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no groups": (drop("param_groups"), "not an optimizer's state dict.*'param_groups'"),
    "no state": (drop("state"), "not an optimizer's state dict.*'state'"),
    "a newer format": (change("nexus_format", value=2), "'nexus_format' .* is 2 .*reads up to 1: a newer"),
    "a newer format of another layout": (
        lambda saved: saved.update(nexus_format=99, state=saved.pop("param_groups")),
        "'nexus_format' .* is 99 .*update nexus",
    ),
    "a format of text": (change("nexus_format", value="1.5"), "'nexus_format' .* is '1.5'"),
    "groups of another type": (change("param_groups", value=3), "not an optimizer's state dict"),
    "too few groups": (drop("param_groups", 1), "has 1 parameter groups, this optimizer 2"),
    "too many parameters": (change(*GROUP1, "params", value=[1, 2]), "has 2 parameters, that of this optimizer 1"),
    "an index that is none": (change(*GROUP1, "params", value=[[1]]), f"{WHERE} must have indices .*as 'params'"),
    "indices that went through JSON": (
        lambda saved: saved.update(state={str(key): value for key, value in saved["state"].items()}),
        r"state\['0'\] .* is of no parameter: param_groups has .*\. JSON makes strings of indices",
    ),
    "state of another index": (
        lambda saved: saved["state"].update({7: saved["state"].pop(0)}),
        r"state\[7\] .* is of no parameter: .*in the groups, that it was saved with",
    ),
    "an object for a rate": (
        change(*GROUP1, "lr", value=SCHEDULE),
        f"{WHERE}: lr must be a number; give the Schedule to the constructor",
    ),
    "a freed moment": (
        lambda saved: saved["state"][1]["exp_avg"].untyped_storage().resize_(0),
        f"{STATE1}: exp_avg has no memory",
    ),
    "no rate": (drop(*GROUP1, "lr"), f"{WHERE} is not AdamW's"),
    "edits that are a tensor": (
        change(*SCHEDULE1, "edits", value=torch.zeros(3)),
        f"{WHERE}: lr_schedule\\['edits'\\] must be a dict",
    ),
    "an index twice": (change(*GROUP1, "params", value=[0]), "has the same parameter index twice"),
    "too many names": (change(*GROUP1, "param_names", value=["a", "b"]), f"{WHERE} must have .*as many param_names"),
    "names of text": (change(*GROUP1, "param_names", value=3), f"{WHERE} must have .*param_names.*got 3"),
    "no parameters": (drop(*GROUP1, "params"), f"{WHERE} must be a dict with 'params'"),
    "a group that is none": (change(*GROUP1, value="group"), f"{WHERE} must be a dict with 'params'"),
    "no betas": (drop(*GROUP1, "betas"), f"{WHERE} is not AdamW's"),
    "lr": (change(*GROUP1, "lr", value=-1.0), f"{WHERE}: lr must be a finite number >= 0, got -1.0"),
    "lr nan": (change(*GROUP1, "lr", value=math.nan), f"{WHERE}: lr must be"),
    "lr text": (change(*GROUP1, "lr", value="fast"), f"{WHERE}: lr must be"),
    "lr tensor": (change(*GROUP1, "lr", value=torch.ones(2)), f"{WHERE}: lr as a tensor must have one element"),
    "lr on meta": (change(*GROUP1, "lr", value=torch.zeros((), device="meta")), f"{WHERE}: a tensor is on the meta"),
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
        f"{STATE1}: exp_avg must be .*floating point.*, got torch.int32",
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
    "a negative average of squares": (
        lambda saved: saved["state"][1]["exp_avg_sq"].flatten()[-1:].fill_(-1e-30),
        f"{STATE1}: exp_avg_sq is negative somewhere",
    ),
    "step of a complex number": (
        change("state", 1, "step", value=torch.tensor(1j)),
        f"{STATE1}: step must be from 0",
    ),
    "step on meta": (
        change("state", 1, "step", value=torch.zeros((), device="meta")),
        f"{STATE1}: step must .*not be on meta",
    ),
    "step text": (change("state", 1, "step", value="three"), f"{STATE1}: step must be from 0 .*got 'three'"),
    "two steps": (change("state", 1, "step", value=torch.ones(2)), f"{STATE1}: step must have one element"),
    "state of a list": (change("state", 1, value=[1, 2]), f"{STATE1} must have"),
    "state of a tensor": (change("state", 1, value=torch.ones(3)), f"{STATE1} must have"),
    "schedule of text": (change(*SCHEDULE1, value="WSD"), f"{WHERE}: lr_schedule must be a dict, got 'WSD'"),
    "schedule's step": (change(*SCHEDULE1, "step", value=-1), rf"{STEP1} must be an int from 0 .*got -1"),
    "schedule's step between two": (
        change(*SCHEDULE1, "step", value=1.5),
        rf"{STEP1} must be an int from 0 .*got 1.5",
    ),
    "schedule's step that is none": (drop(*SCHEDULE1, "step"), rf"{STEP1} must be an int from 0 .*got None"),
    "schedule's step nan": (change(*SCHEDULE1, "step", value=math.nan), rf"{STEP1} must be an int from 0 .*got nan"),
    "a kind of schedule that is unknown": (
        change(*SCHEDULE1, "type", value="Polynomial"),
        rf"{WHERE}: lr_schedule\['type'\] must be one of .*WSD.*got 'Polynomial'",
    ),
    "no kind of schedule": (drop(*SCHEDULE1, "type"), rf"{WHERE}: lr_schedule\['type'\] must be .*got None"),
    "a field of a schedule that is unknown": (
        change(*SCHEDULE1, "power", value=2.0),
        f"{WHERE}: WSD has the fields .*extra: power",
    ),
    "a field of a schedule that is not there": (
        drop(*SCHEDULE1, "peak_lr"),
        f"{WHERE}: WSD has the fields .*missing: peak_lr",
    ),
    "a field of a schedule that is bad": (change(*SCHEDULE1, "peak_lr", value=-1.0), f"{WHERE}: peak_lr must be"),
    "edits of text": (change(*SCHEDULE1, "edits", value="x"), r"lr_schedule\['edits'\] must be"),
    "edits": (change(*SCHEDULE1, "edits", value={"foo": 1}), r"lr_schedule\['edits'\] must be.*decay_start"),
    "edited start": (
        change(*SCHEDULE1, "edits", value={"decay_start": 1.5, "decay_from": 1.0}),
        "decay_start in .*must be an int",
    ),
    "edited rate": (
        change(*SCHEDULE1, "edits", value={"decay_start": 1, "decay_from": math.nan}),
        "decay_from in .*must be a finite number",
    ),
}
# What to do about it is in every message.
REMEDY = (
    r"pass what state_dict\(\) returned|update nexus|as state_dict\(\) has|Give the optimizer the parameters"
    r"|Load it into|Correct this entry|Without the entry, the parameter|delete the entry to keep"
)


@pytest.mark.parametrize(("spoil", "words"), BAD.values(), ids=list(BAD))
def test_a_dict_that_does_not_fit_is_named_and_changes_nothing(
    backend: str, spoil: Callable[[dict[str, Any]], Any], words: str
) -> None:
    optimizer = make(lr=SCHEDULE, weight_decay=0.3, backend=backend)
    saved = copy.deepcopy(make(lr=SCHEDULE, weight_decay=0.1, steps=7).state_dict())
    spoil(saved)
    before, settings = snapshot(optimizer), everything(optimizer)
    with pytest.raises(ValueError, match=words) as caught:
        optimizer.load_state_dict(saved)
    assert re.search(REMEDY, str(caught.value)), caught.value
    assert same_bits(before, snapshot(optimizer))
    assert settings == everything(optimizer)
    set_grads([group["params"][0] for group in optimizer.param_groups], make_grads(make_params(SHAPES)))
    optimizer.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(3))


def saved_and_spoiled(name: str) -> dict[str, Any]:
    saved = copy.deepcopy(make(lr=SCHEDULE, steps=7).state_dict())
    BAD[name][0](saved)
    return saved


@pytest.mark.parametrize("name", [name for name, (_, words) in BAD.items() if words.startswith(STATE1)])
def test_a_bad_state_can_be_deleted_so_that_its_parameter_begins_anew(name: str) -> None:
    saved = saved_and_spoiled(name)
    for group in saved["param_groups"]:
        group["amsgrad"] = False
    del saved["state"][1]
    optimizer = make(lr=SCHEDULE)
    optimizer.load_state_dict(saved)
    first, second = (optimizer.state.get(group["params"][0]) for group in optimizer.param_groups)
    assert int(first["step"]) == 7
    assert first["exp_avg"].all()
    assert second is None


@pytest.mark.parametrize("name", [name for name in BAD if "schedule" in name or "edit" in name])
def test_a_bad_schedule_can_be_set_to_none_so_that_the_present_one_goes_on(name: str) -> None:
    saved = saved_and_spoiled(name)
    for group in saved["param_groups"]:  # the count is then that of the parameters
        group["lr_schedule"] = None
    optimizer = make(lr=SCHEDULE)
    optimizer.load_state_dict(saved)
    set_grads([group["params"][0] for group in optimizer.param_groups], make_grads(make_params(SHAPES)))
    optimizer.step()
    assert [group["lr_schedule"]["step"] for group in optimizer.state_dict()["param_groups"]] == [8, 8]
    assert float(optimizer.param_groups[1]["lr"]) == SCHEDULE(7)


def assert_refused(optimizer: FusedAdamW, saved: Any, words: str, error: type[Exception] = ValueError) -> None:
    before, settings = snapshot(optimizer), everything(optimizer)
    with pytest.raises(error, match=words):
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer))
    assert settings == everything(optimizer)


def test_a_trainers_checkpoint_is_refused_with_the_place_of_the_optimizers_in_it(backend: str) -> None:
    optimizer, inner = make(backend=backend, lr=SCHEDULE), make(lr=SCHEDULE).state_dict()
    weights = {"0.weight": torch.zeros(5)}
    for saved, place in (
        ({"epoch": 3, "model": weights, "optimizer": inner}, "state_dict['optimizer']"),
        (
            {"epoch": 3, "state_dict": weights, "optimizer_states": [inner, inner]},
            "state_dict['optimizer_states'][0]",
        ),
        (weights, "what state_dict() returned"),
    ):
        words = f"got the keys {sorted(saved)}; pass {place}"
        assert_refused(optimizer, saved, re.escape(words) + "$")
        if saved is not weights:
            optimizer.load_state_dict(eval(place, {"state_dict": saved}))


@pytest.mark.parametrize("group_count", [1, 2])
def test_another_models_state_is_refused(backend: str, group_count: int) -> None:
    optimizer = FusedAdamW(make_params(SHAPES), backend=backend)
    for shapes, words in (
        ([(5,), (4, 3)], r"state\[1\] .*exp_avg must be of shape \(3, 4\), got \(4, 3\); another model's\?"),
        (
            [(5,), (3, 4), (3,)],
            r"param_groups\[0\] .* has 3 parameters, that of this optimizer 2\. Give the optimizer",
        ),
    ):
        params = make_params(shapes)
        groups = [{"params": params}] if group_count == 1 else [{"params": [param]} for param in params]
        other = FusedAdamW(groups, lr=0.7, backend=backend)
        set_grads(params, make_grads(params))
        other.step()
        if group_count == 2:
            words = f"has {len(shapes)} parameter groups, this optimizer 1. Give the optimizer the parameters"
        assert_refused(optimizer, other.state_dict(), words)


def test_a_file_that_is_read_without_its_memory_is_refused(backend: str) -> None:
    file = io.BytesIO()
    torch.save(make(lr=SCHEDULE).state_dict(), file)
    file.seek(0)
    saved = torch.load(file, map_location="meta", weights_only=True)
    assert_refused(
        make(lr=SCHEDULE, backend=backend), saved, "exp_avg must be .*not on meta, got .* on meta. Without"
    )


def test_what_cannot_be_copied_is_found_before_anything_is_written(backend: str) -> None:
    saved = make(lr=SCHEDULE, steps=7).state_dict()
    saved["param_groups"][1]["mine"] = threading.Lock()
    assert_refused(make(lr=SCHEDULE, backend=backend), saved, "pickle '_thread.lock' object", TypeError)


def test_the_same_names_in_another_order_are_refused(backend: str) -> None:
    params = make_params([(4,), (4,), (4,)])

    def named(*names: str) -> FusedAdamW:
        optimizer = FusedAdamW(list(zip(names, copies(params), strict=True)), lr=SCHEDULE, backend=backend)
        own = optimizer.param_groups[0]["params"]
        set_grads(own, make_grads(own))
        optimizer.step()
        return optimizer

    optimizer, permuted, renamed = named("a", "b", "c"), named("a", "c", "b"), named("c", "d", "e")
    words = r"param_groups\[0\]\['param_names'\]\[1\] .* is 'c', that of this optimizer 'b': .*in the saved order"
    assert_refused(optimizer, permuted.state_dict(), words)
    optimizer.load_state_dict(renamed.state_dict())  # as torch does
    assert optimizer.param_groups[0]["param_names"] == ["c", "d", "e"]
    first, other = (list(each.state.values())[1]["exp_avg"] for each in (optimizer, renamed))
    assert same_bits([first], [other])


@pytest.mark.parametrize("spoil", [None, 3, [], "state"])
def test_something_else_than_a_dict(spoil: Any) -> None:
    optimizer = make()
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        optimizer.load_state_dict(spoil)


OTHERS = [
    torch.optim.SGD,
    partial(torch.optim.Adam, weight_decay=0.1),
    torch.optim.NAdam,
    torch.optim.RAdam,
    partial(torch.optim.NAdam, decoupled_weight_decay=True),
    partial(torch.optim.RAdam, decoupled_weight_decay=True),
    torch.optim.Adagrad,
    torch.optim.Adafactor,
    torch.optim.RMSprop,
]


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_another_optimizers_state_is_refused(backend: str, kind: type[torch.optim.Optimizer], steps: int) -> None:
    saved = make(kind, steps=steps, lr=0.1).state_dict()
    words = r"param_groups\[0\] of the loaded state dict is not AdamW's: it has .*Load it into the class"
    assert_refused(make(backend=backend), saved, words)


def test_what_else_a_state_dict_holds_is_kept(backend: str) -> None:
    optimizer = make(backend=backend)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["initial_lr"] = 0.7  # of a scheduler
    saved["param_groups"][0]["note"] = "mine"
    saved["state"]["extra"] = {"mine": 1, "step": None}
    saved["state"][0]["ema"] = torch.ones(5)
    fresh = make(steps=0, backend=backend)
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["initial_lr"] == 0.7
    assert fresh.param_groups[0]["note"] == "mine"
    assert fresh.state["extra"] == {"mine": 1, "step": None}
    assert fresh.state[fresh.param_groups[0]["params"][0]]["ema"].sum() == 5
    for option in ("foreach", "fused", "capturable", "differentiable"):
        assert option not in fresh.param_groups[0]


def test_a_load_takes_over_values_and_no_tensors(backend: str) -> None:
    saved = make(backend=backend).state_dict()
    saved["state"][0]["ema"] = torch.ones(5)
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name].requires_grad_()
    fresh = make(steps=0, backend=backend)
    fresh.load_state_dict(saved)
    state = fresh.state[fresh.param_groups[0]["params"][0]]
    assert torch.equal(state["exp_avg"], saved["state"][0]["exp_avg"].detach())
    assert not state["exp_avg"].requires_grad
    saved["state"][0]["ema"].zero_()
    assert state["ema"].sum() == 5


def test_state_of_the_shape_that_a_parameter_had_before_gives_way(backend: str) -> None:
    optimizer = make(backend=backend)
    param = optimizer.param_groups[1]["params"][0]
    other = make(backend=backend)
    param.data = torch.ones(2, 2)
    saved = other.state_dict()
    state = saved["state"][1]
    saved["state"][1] = {name: value if value.dim() == 0 else value[:2, :2] for name, value in state.items()}
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[param]["exp_avg"], saved["state"][1]["exp_avg"])
    param.grad = torch.ones(2, 2)
    optimizer.step()


def test_a_load_after_a_step_in_inference_mode(backend: str) -> None:
    optimizer = make(backend=backend, lr=SCHEDULE)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        for group in optimizer.param_groups:
            group["lr"] = WSD(3, None, 5, 0.1)
        optimizer.step()
    optimizer.begin_decay()
    with pytest.warns(UserWarning, match="stable_steps"):
        optimizer.load_state_dict(saved)
    assert same_bits(list(saved["state"][0].values())[1:], list(optimizer.state_dict()["state"][0].values())[1:])


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
