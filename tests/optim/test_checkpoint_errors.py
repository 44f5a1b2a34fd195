"""State dicts that do not fit: the entry is named, and what to do; nothing is changed."""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
from types import FunctionType
from typing import Any

import pytest
import torch
from references import copies, make_params, same_bits, snapshot
from side_by_side import param, state_of, train

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SCHEDULE = WSD(warmup_steps=3, stable_steps=10, decay_steps=5, peak_lr=0.1)


def make(kind: Any = FusedAdamW, steps: int = 3, **options: Any) -> Any:
    params = make_params([(5,), (3, 4)])
    optimizer = kind([{"params": params[:1]}, {"params": params[1:]}], **options)
    train(optimizer, steps)
    return optimizer


def plain_values(optimizer: FusedAdamW) -> list[Any]:
    """What `snapshot` has not: groups, schedules and their counters, and torch's generator."""
    saved = copy.deepcopy(optimizer.state_dict())
    return [saved["param_groups"], list(saved["state"]), int(optimizer.skipped_steps), torch.get_rng_state().tolist()]


def assert_refused(optimizer: FusedAdamW, saved: Any, words: str, error: type[Exception] = ValueError) -> str:
    before, settings = snapshot(optimizer), plain_values(optimizer)
    with pytest.raises(error, match=words) as caught:
        optimizer.load_state_dict(saved)
    assert same_bits(before, snapshot(optimizer))
    assert settings == plain_values(optimizer)
    return str(caught.value)


GONE = object()


def spoiled(saved: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The state dict with another value, or with what a function makes of the value that is there."""
    *outer, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    root: dict[Any, Any] = {"": saved}
    inner: Any = functools.reduce(lambda container, key: container[key], outer, root)
    if value is GONE:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if isinstance(value, FunctionType) else value
    found: dict[str, Any] = root[""]
    return found


def freed(moment: torch.Tensor) -> torch.Tensor:
    moment.untyped_storage().resize_(0)
    return moment


def bitsandbytes(state: dict[str, Any]) -> dict[str, Any]:
    moments = {"state1": torch.zeros(3, 4, dtype=torch.uint8), "state2": state["exp_avg_sq"]}
    return {"step": int(state["step"]), "qmap1": torch.zeros(256), **moments}


WHERE = "of the loaded state dict"
NONE = "not an optimizer's state dict"
COUNT = r": lr_schedule\['step'\] must be an int from 0"
EDITS = r"/param_groups/1/lr_schedule/edits"
ON_META = torch.zeros((), device="meta")
# The entry, the value there, the words after "... of the loaded state dict".
BAD: list[tuple[str, Any, str]] = [
    ("/param_groups", GONE, f"{NONE}.*'param_groups'"),
    ("/state", GONE, f"{NONE}.*'state'"),
    ("/param_groups", 3, NONE),
    ("/nexus_format", 3, "'nexus_format' .* is 3 .*reads up to 2: a newer"),
    ("/nexus_format", "1.5", "'nexus_format' .* is '1.5'"),
    ("", lambda saved: {"nexus_format": 99, "state": saved["param_groups"]}, "'nexus_format' .* 99 .*update nexus"),
    ("/param_groups/1", GONE, "has 1 parameter groups, this optimizer 2"),
    ("/param_groups/1", "group", " must be a dict with 'params'"),
    ("/param_groups/1/params", GONE, " must be a dict with 'params'"),
    ("/param_groups/1/params", [1, 2], " has 2 parameters, that of this optimizer 1"),
    ("/param_groups/1/params", [], " has 0 parameters, that of this optimizer 1"),
    ("/param_groups/1/params", [[1]], " must have indices .*as 'params'"),
    ("/param_groups/1/params", [0], "has the same parameter index twice"),
    ("/param_groups/1/param_names", ["a", "b"], " must have .*as many param_names"),
    ("/param_groups/1/param_names", 3, " must have .*param_names.*got 3"),
    ("/param_groups/1/lr", GONE, " is not AdamW's"),
    ("/param_groups/1/lr", SCHEDULE, ": lr must be a number; give the Schedule to the constructor"),
    ("/param_groups/1/lr", -1.0, ": lr must be a finite number >= 0, got -1.0"),
    ("/param_groups/1/lr", math.nan, ": lr must be"),
    ("/param_groups/1/lr", "fast", ": lr must be"),
    ("/param_groups/1/lr", torch.ones(2), ": lr as a tensor must have one element"),
    ("/param_groups/1/lr", ON_META, ": a tensor is on the meta"),
    ("/param_groups/1/betas", GONE, " is not AdamW's"),
    ("/param_groups/1/betas", (0.9, 1.5), r": betas\[1\] must be"),
    ("/param_groups/1/amsgrad", "yes", ": amsgrad must be a bool"),
    ("/param_groups/1/amsgrad", True, "must have .*max_exp_avg_sq"),
    ("/param_groups/1/bias_correction", False, " has bias_correction=False"),
    ("/param_groups/1/correct_bias", 0, " has correct_bias=0"),  # of an old AdamW of transformers
    ("/state", lambda state: {7: state[0], 1: state[1]}, r"state\[7\] .* is of no parameter: .*in the groups, that"),
    ("/state", lambda state: {str(key): value for key, value in state.items()}, ".*JSON makes strings of indices"),
    ("/state", lambda state: {"weight": state[0], 1: state[1]}, r"state\['weight'\].*Have names in both places, or"),
    ("/state/1", [1, 2], " must have"),
    ("/state/1", torch.ones(3), " must have"),
    ("/state/1", bitsandbytes, r" is of bitsandbytes, with state1 of torch\.uint8.*optim_bits=32"),
    ("/state/1/exp_avg_sq", GONE, r" must have step, exp_avg, exp_avg_sq, got .*Put in what is missing \(exp_avg_sq"),
    ("/state/1/exp_avg", torch.zeros(4, 3), r": exp_avg must be of shape \(3, 4\), got \(4, 3\); another model's"),
    ("/state/1/max_exp_avg_sq", torch.zeros(7), r": max_exp_avg_sq must be of shape \(3, 4\), got \(7,\)"),
    ("/state/1/exp_avg_sq", [0.0], ": exp_avg_sq must .*got list"),
    ("/state/1/exp_avg", lambda moment: moment.int(), ": exp_avg must be .*floating point.*, got torch.int32"),
    ("/state/1/exp_avg", lambda moment: moment.to_sparse(), ": exp_avg must be dense.*sparse_coo"),
    ("/state/1/exp_avg", lambda each: each.to("meta"), ": exp_avg must be .*not on meta, got .* on meta. Without"),
    ("/state/1/exp_avg", freed, ": exp_avg has no memory"),
    ("/state/1/exp_avg_sq", lambda moment: moment.index_fill(1, torch.tensor(3), -1e-30), ": exp_avg_sq is negative"),
    ("/state/1/exp_avg_sq", lambda moment: (-moment).to(torch.float8_e5m2), ": exp_avg_sq is negative somewhere"),
    ("/state/1/step", GONE, r" must have step, .*, got \['exp_avg', 'exp_avg_sq'\].*Put in what is missing \(step\)"),
    ("/state/1/step", torch.tensor(-1.0), ": step must be from 0"),
    ("/state/1/step", torch.tensor(math.nan), ": step must be from 0"),
    ("/state/1/step", torch.tensor(1j), ": step must be from 0"),
    ("/state/1/step", ON_META, ": step must .*not be on meta"),
    ("/state/1/step", "three", ": step must be from 0 .*got 'three'"),
    ("/state/1/step", torch.ones(2), ": step must have one element"),
    ("/param_groups/1/lr_schedule", "WSD", ": lr_schedule must be a dict, got 'WSD'"),
    ("/param_groups/1/lr_schedule/step", -1, f"{COUNT} .*got -1"),
    ("/param_groups/1/lr_schedule/step", 1.5, f"{COUNT} .*got 1.5"),
    ("/param_groups/1/lr_schedule/step", math.nan, f"{COUNT} .*got nan"),
    ("/param_groups/1/lr_schedule/step", GONE, f"{COUNT} .*got None"),
    ("/param_groups/1/lr_schedule/type", "Poly", r": lr_schedule\['type'\] must be one of .*WSD.*'Poly'"),
    ("/param_groups/1/lr_schedule/type", GONE, r": lr_schedule\['type'\] must be .*got None"),
    ("/param_groups/1/lr_schedule/power", 2.0, ": WSD has the fields .*extra: power"),
    ("/param_groups/1/lr_schedule/peak_lr", GONE, ": WSD has the fields .*missing: peak_lr"),
    ("/param_groups/1/lr_schedule/peak_lr", -1.0, ": peak_lr must be"),
    (EDITS, "x", r": lr_schedule\['edits'\] must be"),
    (EDITS, torch.zeros(3), r": lr_schedule\['edits'\] must be a dict"),
    (EDITS, {"foo": 1}, r": lr_schedule\['edits'\] must be.*decay_start"),
    (EDITS, {"decay_start": 1.5, "decay_from": 1.0}, ".*decay_start in .*must be an int"),
    (EDITS, {"decay_start": 1, "decay_from": math.nan}, ".*decay_from in .*must be a finite number"),
]
IDS = [f"{number} {path[1:]}" for number, (path, _, _) in enumerate(BAD)]
# What to do about it is in every message.
REMEDY = (
    r"pass what state_dict\(\) returned|update nexus|as state_dict\(\) has|Give the optimizer the parameters"
    r"|Load it into|Correct this entry|Without the entry, the parameter|delete the entry to keep"
    r"|Go on with the optimizer that saved it|optim_bits=32|Have names in both places"
)


def full(path: str, words: str) -> str:
    """With the place that a message begins with, where `words` are what comes after it."""
    holder = re.match(r"/(param_groups|state)/1", path)
    if holder is None or words[0] not in " :.":
        return words
    return rf"{holder[1]}\[1\] {WHERE}{words}"


@pytest.mark.parametrize(("path", "value", "words"), BAD, ids=IDS)
def test_a_dict_that_does_not_fit_is_named_and_changes_nothing(
    backend: str, path: str, value: Any, words: str
) -> None:
    optimizer = make(lr=SCHEDULE, weight_decay=0.3, backend=backend)
    saved = spoiled(copy.deepcopy(make(lr=SCHEDULE, weight_decay=0.1, steps=7).state_dict()), path, value)
    said = assert_refused(optimizer, saved, full(path, words))
    assert re.search(REMEDY, said), said
    train(optimizer, 1)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(3))


@pytest.mark.parametrize(("path", "value"), [case[:2] for case in BAD if re.search("/state/1|lr_sch", case[0])])
def test_what_is_bad_can_be_left_out(path: str, value: Any) -> None:
    """A state, whose parameter then begins anew, or the schedules, where the present ones then go on."""
    saved = spoiled(copy.deepcopy(make(lr=SCHEDULE, steps=7).state_dict()), path, value)
    if "state" in path:
        del saved["state"][1]
    else:
        for group in saved["param_groups"]:
            group["lr_schedule"] = None
    optimizer = make(lr=SCHEDULE)
    optimizer.load_state_dict(saved)
    train(optimizer, 1)
    now = optimizer.state_dict()
    assert [int(state["step"]) for state in now["state"].values()] == [8, 1 if "state" in path else 8]
    assert [group["lr_schedule"]["step"] for group in now["param_groups"]] == [8, 8]
    assert float(optimizer.param_groups[1]["lr"]) == SCHEDULE(7)


def test_a_trainers_checkpoint_is_refused_with_the_place_of_the_optimizers_in_it() -> None:
    optimizer, inner = make(lr=SCHEDULE), make(lr=SCHEDULE).state_dict()
    weights = {"0.weight": torch.zeros(5)}
    places = {
        "what state_dict() returned": weights,
        "state_dict['optimizer']": {"epoch": 3, "model": weights, "optimizer": inner},
        "state_dict['optimizer_states'][0]": {"epoch": 3, "state_dict": weights, "optimizer_states": [inner, inner]},
    }
    for place, saved in places.items():
        assert_refused(optimizer, saved, re.escape(f"got the keys {sorted(saved)}; pass {place}") + "$")
        if saved is not weights:
            optimizer.load_state_dict(eval(place, {"state_dict": saved}))


UNCOPYABLE = {
    "a lock": (threading.Lock(), TypeError, "pickle '_thread.lock' object"),
    "no leaf": (param(2) * 2, RuntimeError, "deepcopy"),
}


@pytest.mark.parametrize(("entry", "error", "words"), UNCOPYABLE.values(), ids=UNCOPYABLE)
@pytest.mark.parametrize("place", ["param_groups", "state"])
def test_what_cannot_be_copied_is_found_before_anything_is_written(
    place: str, entry: Any, error: type[Exception], words: str
) -> None:
    saved = make(lr=SCHEDULE, steps=7).state_dict()
    saved[place][1]["mine"] = entry
    assert_refused(make(lr=SCHEDULE), saved, words, error)


def test_the_same_names_in_another_order_are_refused() -> None:
    params = make_params([(4,), (4,), (4,)])

    def named(*names: str) -> FusedAdamW:
        optimizer = FusedAdamW(list(zip(names, copies(params), strict=True)), lr=SCHEDULE)
        train(optimizer, 1)
        return optimizer

    optimizer, permuted, renamed = (named(*names) for names in ("abc", "acb", "cde"))
    words = r"param_groups\[0\]\['param_names'\]\[1\] .* is 'c', that of this optimizer 'b': .*in the saved order"
    assert_refused(optimizer, permuted.state_dict(), words)
    optimizer.load_state_dict(renamed.state_dict())  # as torch does
    assert optimizer.param_groups[0]["param_names"] == ["c", "d", "e"]
    assert same_bits(*(list(state_of(each, 1).values()) for each in (optimizer, renamed)))


@pytest.mark.parametrize("given", [None, 3, [], "state"])
def test_something_else_than_a_dict(given: Any) -> None:
    with pytest.raises(TypeError, match="state_dict must be a dict"):
        make().load_state_dict(given)


OTHERS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("SGD", "NAdam", "RAdam", "Adagrad", "Adafactor", "RMSprop")),
    *((name, {"decoupled_weight_decay": True}) for name in ("NAdam", "RAdam")),
    ("Adam", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), OTHERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_another_optimizers_state_is_refused(name: str, options: dict[str, Any], steps: int) -> None:
    saved = make(getattr(torch.optim, name), steps=steps, lr=0.1, **options).state_dict()
    words = r"param_groups\[0\] of the loaded state dict is not AdamW's: it has .*Load it into the class"
    assert_refused(make(), saved, words)
