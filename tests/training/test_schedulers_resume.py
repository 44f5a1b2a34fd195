"""Schedulers that go on from a state dict: the constructor's schedule, the saved place, the saved edits."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from test_schedulers import GIVEN, Run, same, through_a_file

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule

KINDS = ("SGD", "FusedAdamW", "torch", "reference")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_pair = pytest.mark.parametrize(("saving", "loading"), list(itertools.product(KINDS[:2], KINDS)))
WITHOUT = {"extended": None, "decay_start": None, "decay_from": None}
Edit = Callable[[Any], None]


def begin_decay(who: Any) -> None:
    who.begin_decay()


def extend(who: Any) -> None:
    who.extend_stable(3)
    who.extend_stable(1)


def after(kind: str, steps: int, *edits: Edit, then: int = 0) -> dict[str, Any]:
    """The state of a scheduler of GIVEN that was edited after so many steps."""
    run = Run(kind, steps)
    for edit in edits:
        edit(run.scheduler)
    run.train(then)
    state = through_a_file(run.scheduler.state_dict())
    assert state["schedule"] == GIVEN.to_dict()
    return {**state, "standing": run.scheduler.schedule}


def old(state: dict[str, Any]) -> dict[str, Any]:
    """As earlier releases saved it: the schedule as it stands, and no edits."""
    saved = {**state, "schedule": state["standing"].to_dict()}
    return {name: value for name, value in saved.items() if name not in ("edits", "standing")}


def load(kind: str, schedule: Schedule, state: dict[str, Any]) -> tuple[Any, list[float], list[str]]:
    """A scheduler of `schedule` that goes on from a state, the rates of its next updates, and what it warned of."""
    run = Run(kind, schedule=schedule)
    rates = run.scheduler._device_rates
    rows = rates and rates.table.rows
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.scheduler.load_state_dict(state)
    assert all(warning.filename == __file__ for warning in caught)
    assert (rates and rates.table.rows) is rows  # a graph may read it
    assert run.scheduler.last_epoch == state["last_epoch"]
    assert run.rates() == run.scheduler.get_last_lr()
    return run.scheduler, run.train(20), [str(warning.message) for warning in caught]


def differ(**fields: tuple[Any, Any]) -> list[str]:
    return [
        f"schedule.{name} was {before!r} in the checkpoint and is {now!r} now; the run goes on with the latter"
        for name, (before, now) in fields.items()
    ]


@pytest.mark.parametrize(
    ("before", "now", "fields"),
    [
        (GIVEN, replace(GIVEN, stable_steps=None, peak_lr=0.5), {"stable_steps": (5, None), "peak_lr": (1e-2, 0.5)}),
        (replace(GIVEN, decay_type="sqrt"), GIVEN, {"decay_type": ("sqrt", "linear")}),
        (CosineRestarts(peak_lr=1.0), CosineRestarts(peak_lr=1.0, min_lr=0.1), {"min_lr": (0.0, 0.1)}),
        (
            CosineRestarts(peak_lr=1.0, cycle_length=4),
            CosineRestarts(peak_lr=1.0, min_lr=0.0, cycle_length=4, cycle_mult=2.0),
            {"cycle_mult": (1.0, 2.0)},
        ),
        (
            Cosine(peak_lr=1.0, total_steps=9),
            Cosine(peak_lr=1.0, total_steps=30, warmup_steps=9),
            {"total_steps": (9, 30), "warmup_steps": (0, 9)},
        ),
        (GIVEN, GIVEN, {}),
    ],
    ids=str,
)
@each_kind
def test_the_constructor_wins_and_each_difference_is_said(
    kind: str, before: Schedule, now: Schedule, fields: dict[str, Any]
) -> None:
    state = Run(kind, 7, before).scheduler.state_dict()
    without = {name: value for name, value in state.items() if name != "edits"}
    for saved in (state, without):
        scheduler, used, said = load(kind, now, saved)
        assert sorted(said) == sorted(differ(**fields))
        assert scheduler.schedule == now
        assert same(kind, used, now.values(7, 27))
        assert scheduler.state_dict()["schedule"] == now.to_dict()


OTHERS = [
    GIVEN,
    replace(GIVEN, decay_steps=9, min_lr=1e-3, decay_type="sqrt"),
    replace(GIVEN, stable_steps=None),
    replace(GIVEN, warmup_steps=12, peak_lr=2e-2),
    replace(GIVEN, warmup_steps=0, stable_steps=40),
]


@pytest.mark.parametrize("other", OTHERS, ids=str)
@each_pair
@pytest.mark.parametrize(("edit", "at"), [(begin_decay, 2), (begin_decay, 6), (begin_decay, 9), (extend, 4)])
def test_edits_are_made_to_the_constructors_schedule(
    saving: str, loading: str, edit: Edit, at: int, other: WSD
) -> None:
    state = after(saving, at, edit, then=2)
    edits: dict[str, Any] = {}
    expected = other
    if edit is extend:
        edits = {"extended": 4}
        expected = other if other.stable_steps is None else other.extend_stable(4)
    elif at < 8:  # at 9 the decay had begun by itself, which is no edit
        edits = {"decay_start": at, "decay_from": GIVEN(at)}
        expected = replace(other, warmup_steps=0, stable_steps=at, peak_lr=GIVEN(at))
    assert state["edits"] == {**WITHOUT, **edits}
    scheduler, used, said = load(loading, other, state)
    assert len(said) == sum(value != getattr(other, name) for name, value in vars(GIVEN).items())
    assert scheduler.state_dict()["edits"] == state["edits"]
    assert scheduler.get_phase(at + 2) == expected.phase(at + 2)
    assert same(loading, used, expected.values(at + 2, at + 22))


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("edits", [(extend,), (begin_decay,), (extend, begin_decay), ()], ids=len)
def test_an_optimizer_with_that_schedule_resumes_alike(edits: tuple[Edit, ...], other: WSD) -> None:
    def rates(optimizer: FusedAdamW, steps: int) -> list[float]:
        used = []
        for _ in range(steps):
            for param in optimizer.param_groups[0]["params"]:
                param.grad = param.detach().clone()
            optimizer.step()
            used.append(float(optimizer.param_groups[0]["lr"]))
        return used

    first, second = (FusedAdamW(Run("SGD").model.parameters(), lr=schedule) for schedule in (GIVEN, other))
    rates(first, 6)
    for edit in edits:
        edit(first)
    rates(first, 1)
    saved = through_a_file(first.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        second.load_state_dict(saved)
    state = after("FusedAdamW", 6, *edits, then=1)
    assert state["edits"] == saved["param_groups"][0]["lr_schedule"]["edits"]
    _, used, said = load("FusedAdamW", other, state)
    assert used == rates(second, 20)
    assert said == [str(warning.message).replace("lr_schedule.", "schedule.") for warning in caught]


@pytest.mark.parametrize("edit", [extend, begin_decay])
@each_kind
def test_edits_before_the_load_are_not_those_of_the_loaded_run(kind: str, edit: Edit) -> None:
    run = Run(kind, 5)
    scheduler = run.scheduler
    state = scheduler.state_dict()
    edit(scheduler)
    scheduler.load_state_dict(state)
    assert scheduler.state_dict() == state
    edit(scheduler)
    twice = scheduler.schedule
    scheduler.load_state_dict(scheduler.state_dict())
    assert scheduler.schedule == twice
    assert run.train(15) == twice.values(5, 20)


@each_kind
def test_edits_after_a_step_back(kind: str) -> None:
    run = Run(kind, 6)
    scheduler = run.scheduler
    scheduler.begin_decay()
    with pytest.warns(UserWarning, match="epoch parameter"):
        scheduler.step(4)
    scheduler.extend_stable(3)  # the decay waits again, and is put off
    assert scheduler.schedule == replace(GIVEN, stable_steps=6)
    resumed, used, said = load(kind, GIVEN, scheduler.state_dict())
    assert (resumed.schedule, said) == (scheduler.schedule, [])
    assert used == run.train(20) == scheduler.schedule.values(4, 24)


# State dicts of earlier releases.


@pytest.mark.parametrize("at", [1, 3, 5, 8, 10, 14], ids=lambda at: f"at{at}")
@pytest.mark.parametrize("edits", [(), (extend,), (begin_decay,), (extend, begin_decay)], ids=len)
@each_kind
def test_an_old_state_goes_on_as_the_run_would_have(kind: str, edits: tuple[Any, ...], at: int) -> None:
    state = after(kind, at, *edits, then=2)
    scheduler, used, said = load(kind, GIVEN, old(state))
    assert scheduler.schedule == state["standing"]
    assert used == state["standing"].values(at + 2, at + 22)
    assert len(said) == (state["standing"] != GIVEN)
    assert all(str(scheduler._edits) in text for text in said)
    again, used_again, said = load(kind, GIVEN, scheduler.state_dict() | {"last_epoch": at + 2})
    assert (again.schedule, used_again, said) == (scheduler.schedule, used, [])


@each_kind
def test_the_constructor_wins_over_an_old_state_too(kind: str) -> None:
    other = WSD(warmup_steps=3, stable_steps=None, decay_steps=9, peak_lr=5e-2, min_lr=1e-3, decay_type="sqrt")
    state = old(after(kind, 6, begin_decay, then=2))
    _, used, said = load(kind, other, state)
    assert used == WSD(
        warmup_steps=3, stable_steps=3, decay_steps=9, peak_lr=1e-2, min_lr=1e-3, decay_type="sqrt"
    ).values(8, 28)  # the decay that has begun is not lost
    assert said[1:] == differ(decay_steps=(6, 9), min_lr=(1e-4, 1e-3), decay_type=("linear", "sqrt"))
    assert "{'decay_start': 6, 'decay_from': 0.01}" in said[0]

    other = replace(GIVEN, peak_lr=5e-2)
    _, used, said = load(kind, other, old(after(kind, 9)))  # in a decay that nobody began: no edit
    assert used == other.values(9, 29)
    assert said == differ(peak_lr=(1e-2, 5e-2))
    for other in (
        replace(GIVEN, stable_steps=None),
        WSD(warmup_steps=4, stable_steps=5, decay_steps=6, peak_lr=1e-2, min_lr=1e-4),
        WSD(warmup_steps=3, stable_steps=30, decay_steps=6, peak_lr=1e-2, min_lr=1e-4),
    ):
        scheduler, used, said = load(kind, other, old(after(kind, 4, extend)))  # in the stable phase
        assert used == other.values(4, 24)
        assert "schedule.stable_steps was 9" in " ".join(said)
        assert scheduler.state_dict()["edits"] == WITHOUT


# What is refused.

BAD_EDITS: list[tuple[Any, str]] = [
    ("x", "edits must be a dict of .*, got 'x'"),
    ([1], "edits must be a dict"),
    ({"foo": 1}, "edits must be a dict of .*'decay_start'.*got {'foo': 1}"),
    ({"decay_start": 3}, "edits must be a dict"),
    ({"extended": -1}, "extended in edits must be an int from 0 .*got -1"),
    ({"extended": 1.5}, "extended in edits must be an int"),
    ({"extended": 2**53}, "stable_steps must be an int from 0"),
    ({"decay_start": -1, "decay_from": 1e-2}, "decay_start in edits must be an int from 0"),
    ({"decay_start": True, "decay_from": 1e-2}, "decay_start in edits must be an int from 0"),
    ({"decay_start": 2**62, "decay_from": 1e-2}, "stable_steps must be an int from 0"),
    ({"decay_start": 6, "decay_from": "1"}, "decay_from in edits must be a finite number"),
    ({"decay_start": 6, "decay_from": 1e-5}, r"min_lr must be a number from 0 to peak_lr=1e-05"),
    ({"decay_start": 6, "decay_from": 0.0}, r"peak_lr must be a finite number > 0"),
]
SAVED = {"schedule": GIVEN.to_dict(), "edits": WITHOUT, "last_epoch": 9, "base_lrs": [0.5], "_step_count": 10}
BAD_STATES: list[tuple[Any, type[Exception], str]] = [
    (None, ValueError, "it needs 'schedule' and 'last_epoch', got None"),
    ({}, ValueError, r"it needs 'schedule' and 'last_epoch', got \[\]"),
    ({"last_epoch": 4, "lr_lambdas": [None]}, ValueError, "not a WSDScheduler's state dict: .*'lr_lambdas'"),
    (SAVED | {"last_epoch": -1}, ValueError, "last_epoch must be an int from 0"),
    (SAVED | {"last_epoch": 2.5}, TypeError, "last_epoch must be an int from 0"),
    (SAVED | {"_step_count": -1}, ValueError, "_step_count must be an int from 0"),
    (SAVED | {"base_lrs": None}, TypeError, "None"),
    (SAVED | {"schedule": None}, TypeError, "a schedule must be a dict"),
    (SAVED | {"schedule": GIVEN.to_dict() | {"decay_steps": 0}}, ValueError, "decay_steps must be"),
    (
        SAVED | {"schedule": Cosine(peak_lr=1.0, total_steps=9).to_dict()},
        ValueError,
        "holds a Cosine schedule, WSDScheduler takes WSD",
    ),
    # Warnings are errors in these tests.
    (SAVED | {"schedule": replace(GIVEN, peak_lr=1.0).to_dict()}, UserWarning, r"peak_lr was 1\.0"),
    *(
        (SAVED | {"edits": edits}, ValueError, rf"extend_stable\(\).*{words}.*; or set .* to {{}}, to go")
        for edits, words in BAD_EDITS
    ),
]


@pytest.mark.parametrize(("state", "error", "words"), BAD_STATES)
@each_kind
def test_a_bad_state_changes_nothing(kind: str, state: Any, error: type[Exception], words: str) -> None:
    run = Run(kind, 4)
    run.scheduler.extend_stable(2)
    before = run.scheduler.state_dict()
    with pytest.raises(error, match=words):
        run.scheduler.load_state_dict(state)
    run.optimizer.param_groups[0]["lr_scale"] = -1.0
    with pytest.raises(ValueError, match="lr_scale"):
        run.scheduler.load_state_dict(SAVED)
    run.optimizer.param_groups[0]["lr_scale"] = 1.0
    assert run.scheduler.state_dict() == before
    assert run.train(20) == GIVEN.extend_stable(2).values(4, 24)


@each_kind
def test_a_cosine_has_no_edits(kind: str) -> None:
    scheduler = Run(kind, schedule=CosineRestarts(peak_lr=1.0)).scheduler
    state = scheduler.state_dict()
    assert state["edits"] == {}
    for none in ({}, None, WITHOUT):
        scheduler.load_state_dict({**state, "edits": none})
    with pytest.raises(ValueError, match=r"edits must be a dict of nothing, got {'extended': 1}"):
        scheduler.load_state_dict({**state, "edits": {"extended": 1}})
