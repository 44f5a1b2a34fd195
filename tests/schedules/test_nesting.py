"""Schedules within schedules: as deep as is allowed, all that visits the parts works; deeper, an error says so."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import pytest

from nexus.plot import default_steps, title
from nexus.schedules import Constant, Linear, Schedule, join
from nexus.schedules.base import MAX_DEPTH

WAYS: dict[str, Callable[[Schedule], Schedule]] = {
    "warmup": lambda s: s.warmup(1),
    "cooldown": lambda s: s.cooldown(1, to=0.5),
    "then": lambda s: s.then(Linear(start_lr=0.5, end_lr=0.25, total_steps=1)),
    "join": lambda s: join([Constant(1.0), s], [1]),
    "repeat": lambda s: s.repeat(1),
}


def nested(way: str, depth: int) -> Schedule:
    schedule: Schedule = Linear(start_lr=1.0, end_lr=0.5, total_steps=2)
    for _ in range(depth):
        schedule = WAYS[way](schedule)
    return schedule


def rates_of(schedule: Schedule) -> list[float]:
    return [schedule(step) for step in (0, 1, 2, MAX_DEPTH // 2, MAX_DEPTH, MAX_DEPTH + 2, 2 * MAX_DEPTH)]


@pytest.mark.parametrize("way", WAYS)
def test_the_deepest_does_all_that_schedules_do(way: str) -> None:
    schedule = nested(way, MAX_DEPTH)
    assert len([part for part in schedule.parts() if part == Linear(start_lr=1.0, end_lr=0.5, total_steps=2)]) == 1
    assert schedule.length == 2 + MAX_DEPTH * (way != "repeat")
    assert schedule.phase(0)
    assert title(schedule)
    assert default_steps(schedule) > 2
    rates = rates_of(schedule)
    assert rates_of(2.0 * schedule) == [2.0 * rate for rate in rates]
    copies = [
        copy.deepcopy(schedule),
        pickle.loads(pickle.dumps(schedule)),
        Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))),
    ]
    for each in copies:
        assert each == schedule
        assert hash(each) == hash(schedule)
        assert repr(each) == repr(schedule)
        assert rates_of(each) == rates
        with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
            WAYS[way](each)


@pytest.mark.parametrize("way", WAYS)
def test_deeper_is_refused_by_name(way: str) -> None:
    words = rf"would hold schedules within schedules more than {MAX_DEPTH} deep; .*join\(\[...\], \[...\]\)"
    with pytest.raises(ValueError, match=words):
        nested(way, 400)


def test_a_dict_that_is_deeper_is_refused_by_name() -> None:
    saved = Linear(start_lr=1.0, end_lr=0.5, total_steps=2).to_dict()
    for _ in range(2000):
        saved = {"type": "Repeated", "schedule": saved, "n": None}
    with pytest.raises(ValueError, match=f"Repeated holds schedules within schedules more than {MAX_DEPTH} deep"):
        Schedule.from_dict(saved)


def test_the_parts_of_one_join_are_one_level() -> None:
    schedule = join([Constant(float(i)) for i in range(1000)], list(range(1, 1000)))
    assert schedule.values(0, 1000) == [float(i) for i in range(1000)]
