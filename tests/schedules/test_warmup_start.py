"""`warmup_start_lr`: warm-ups that begin elsewhere than at the minimum, as transformers' and nanoGPT's do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from references import make_params
from side_by_side import train

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, WSDS, Cosine, CosineRestarts, Schedule
from nexus.schedules.bounds import bounds_of
from nexus.training.schedulers import (
    CosineAnnealingScheduler,
    CosineRestartScheduler,
    ScheduleLR,
    WSDScheduler,
)

WARMUP, TOTAL, DECAY, PEAK, LEAST = 13, 1013, 101, 6e-4, 6e-5

OF_EACH: list[Schedule] = [
    WSD(warmup_steps=4, stable_steps=3, decay_steps=4, peak_lr=1.0, min_lr=0.25, warmup_start_lr=0.5),
    WSDS(warmup_steps=4, cycle_length=4, decay_steps=2, peak_lr=1.0, min_lr=0.25, warmup_start_lr=0.5),
    Cosine(peak_lr=1.0, total_steps=12, min_lr=0.25, warmup_steps=4, warmup_start_lr=0.5),
    CosineRestarts(peak_lr=1.0, min_lr=0.25, cycle_length=4, warmup_steps=4, warmup_start_lr=0.5),
    CosineRestarts(peak_lr=1.0, min_lr=0.25, cycle_length=4, warmup_steps=4, cycle_decay=0.5, warmup_start_lr=0.5),
    CosineRestarts(
        peak_lr=1.0, min_lr=0.25, cycle_length=4, cycle_mult=2.0, warmup_steps=4, cycle_decay=0.5, warmup_start_lr=0.5
    ),
]
of_each = pytest.mark.parametrize("schedule", OF_EACH, ids=repr)


@of_each
def test_the_warm_up_begins_there_and_nothing_else_changes(schedule: Any) -> None:
    assert schedule.values(0, 5) == [0.5, 0.625, 0.75, 0.875, 1.0]
    given = schedule.to_dict()
    del given["warmup_start_lr"]
    older = Schedule.from_dict(given)  # an earlier version's
    assert older.values(0, 5) == [0.25, 0.4375, 0.625, 0.8125, 1.0]
    assert older.values(4, 30) == schedule.values(4, 30)
    assert older.to_dict() == given
    assert bounds_of(schedule)[1] == (1.0, 4)


@of_each
def test_it_is_saved_and_multiplied(schedule: Any) -> None:
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule
    assert (2 * schedule).values(0, 30) == [2 * rate for rate in schedule.values(0, 30)]
    assert (2 * schedule).warmup_start_lr == 1.0


@of_each
@pytest.mark.parametrize(("wrong", "error"), [(-0.1, ValueError), (1.5, ValueError), ("0", TypeError)])
def test_a_bad_one_is_named(schedule: Schedule, wrong: object, error: type[Exception]) -> None:
    given = schedule.to_dict() | {"warmup_start_lr": wrong}
    with pytest.raises(error, match=r"^warmup_start_lr must be a .*number.*, got "):
        Schedule.from_dict(given)


@of_each
def test_schedulers_take_it(schedule: Any) -> None:
    given = {name: value for name, value in vars(schedule).items() if not name.startswith("_")}
    makers: dict[type, Callable[..., ScheduleLR[Any]]] = {
        WSD: WSDScheduler,
        Cosine: CosineAnnealingScheduler,
        CosineRestarts: CosineRestartScheduler,
    }
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    make = makers.get(type(schedule))
    scheduler = ScheduleLR(optimizer, schedule) if make is None else make(optimizer, **given)
    assert scheduler.schedule == schedule


def test_from_fractions_takes_it() -> None:
    schedule = WSD.from_fractions(100, warmup=0.1, decay=0.2, peak_lr=1.0, min_lr=0.5, warmup_start_lr=0.0)
    assert schedule.values(0, 2) == [0.0, 0.1]
    assert schedule(100) == 0.5


# A decay that begins in such a warm-up, where the rate may be below the minimum.


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6])
def test_a_decay_begun_in_the_warm_up_goes_to_the_minimum(backend: str, at: int) -> None:
    schedule = WSD(warmup_steps=4, stable_steps=None, decay_steps=4, peak_lr=1.0, min_lr=0.5, warmup_start_lr=0.0)
    ending = schedule.begin_decay(at)
    first = max(schedule(at), 0.5)
    falling = [0.5 + (1 - step / 4) * (first - 0.5) for step in range(4)]
    assert ending.values(at, at + 8) == [*falling, *[0.5] * 4]

    optimizer = FusedAdamW(make_params([(2,)]), lr=schedule, backend=backend)
    train(optimizer, at)
    optimizer.begin_decay()
    assert optimizer.schedule == ending
    other = FusedAdamW(make_params([(2,)]), lr=schedule, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    for step in range(at, at + 8):
        assert optimizer.next_lr() == other.next_lr() == [ending(step)]
        train(optimizer, 1)
        train(other, 1)

    for kind in (torch.optim.SGD, FusedAdamW):
        over = kind(make_params([(2,)]), lr=1.0)
        scheduler = WSDScheduler(
            over, warmup_steps=4, stable_steps=None, decay_steps=4, peak_lr=1.0, min_lr=0.5, warmup_start_lr=0.0
        )
        for _ in range(at):
            train(over, 1)
            scheduler.step()
        scheduler.begin_decay()
        assert scheduler.schedule == ending
        for step in range(at, at + 8):
            assert float(over.param_groups[0]["lr"]) == ending(step)
            train(over, 1)
            scheduler.step()


# The schedules of others, each written as one of these.


def ulps(schedule: Schedule, rates: Iterable[float]) -> float:
    """The largest difference to these rates, in units of the peak's last place."""
    return max(abs(schedule(step) - rate) for step, rate in enumerate(rates)) / math.ulp(PEAK)


def of_transformers(name: str, **more: Any) -> list[float]:
    """The rates of the real object at every step of a run."""
    transformers = pytest.importorskip("transformers", reason="the real objects are transformers' own")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    scheduler = transformers.get_scheduler(name, optimizer, WARMUP, TOTAL, more or None)
    rates = []
    for _ in range(TOTAL + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_transformers_cosine() -> None:
    schedule = Cosine(peak_lr=PEAK, total_steps=TOTAL, warmup_steps=WARMUP)
    rates = of_transformers("cosine")
    assert schedule.values(0, WARMUP + 1) == rates[: WARMUP + 1]
    assert ulps(schedule, rates) <= 2


def test_transformers_cosine_with_min_lr() -> None:
    schedule = Cosine(peak_lr=PEAK, total_steps=TOTAL, min_lr=LEAST, warmup_steps=WARMUP, warmup_start_lr=0.0)
    rates = of_transformers("cosine_with_min_lr", min_lr=LEAST)
    assert schedule.values(0, WARMUP + 1) == rates[: WARMUP + 1]
    assert ulps(schedule, rates) <= 2


@pytest.mark.parametrize(("theirs", "ours"), [("linear", "linear"), ("cosine", "cosine"), ("1-sqrt", "sqrt")])
def test_transformers_warmup_stable_decay(theirs: str, ours: str) -> None:
    schedule = WSD(
        warmup_steps=WARMUP,
        stable_steps=TOTAL - WARMUP - DECAY,
        decay_steps=DECAY,
        peak_lr=PEAK,
        min_lr=0.1 * PEAK,
        decay_type=ours,
    )
    more = {"num_decay_steps": DECAY, "decay_type": theirs, "min_lr_ratio": 0.1}
    rates = of_transformers("warmup_stable_decay", **more)
    assert rates[0] == 0.1 * PEAK  # the warm-up begins at the minimum, as by default here
    assert ulps(schedule, rates) <= 2


def of_nanogpt(it: int) -> float:
    """`get_lr` of nanoGPT's train.py."""
    if it < WARMUP:
        return PEAK * (it + 1) / (WARMUP + 1)
    if it > TOTAL:
        return LEAST
    decay_ratio = (it - WARMUP) / (TOTAL - WARMUP)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))
    return LEAST + coeff * (PEAK - LEAST)


def of_earlier_nanogpt(it: int) -> float:
    """The same in earlier versions: the first update has the rate 0."""
    return PEAK * it / WARMUP if it < WARMUP else of_nanogpt(it)


@pytest.mark.parametrize(
    ("get_lr", "first"), [(of_nanogpt, PEAK / (WARMUP + 1)), (of_earlier_nanogpt, 0.0)], ids=["nanoGPT", "earlier"]
)
def test_nanogpt(get_lr: Callable[[int], float], first: float) -> None:
    schedule = Cosine(peak_lr=PEAK, total_steps=TOTAL, min_lr=LEAST, warmup_steps=WARMUP, warmup_start_lr=first)
    assert ulps(schedule, map(get_lr, range(2 * TOTAL))) <= 2


def test_a_decay_that_began_below_where_another_warm_up_begins_goes_on() -> None:
    """The warm-up is over, wherever it has begun."""
    given = {"warmup_steps": 10, "stable_steps": 4, "decay_steps": 4, "peak_lr": 1.0}

    def after(schedule: WSD, steps: int) -> FusedAdamW:
        optimizer = FusedAdamW(make_params([3]), lr=schedule, backend="reference")
        train(optimizer, steps)
        return optimizer

    began = after(WSD(**given), 2)
    began.begin_decay()
    resumed = after(WSD(**given, warmup_start_lr=0.5), 0)
    with pytest.warns(UserWarning, match="warmup_start_lr was None"):
        resumed.load_state_dict(began.state_dict())
    assert [resumed.schedule(step) for step in range(2, 7)] == [began.schedule(step) for step in range(2, 7)]
