"""`ReduceOnPlateau`: as torch's, bit for bit, over streams of metrics; as a value; and what it refuses."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch

from nexus.schedules import WSD, Constant, Cosine, Linear, ReduceOnPlateau, Schedule, from_torch, join, reports
from nexus.schedules.imports import NotImportable
from nexus.schedules.table import ScheduleTable, lower
from nexus.training.schedulers import ScheduleLR

SETS, STREAMS, REPORTS = 200, 50, 40  # 10,000 streams in all
METRICS = (1.0, 1.0, 0.9, 0.9 * (1 - 1e-4), -0.5, 0.0, -0.0, math.nan, math.inf, -math.inf)


def options(choose: random.Random) -> dict[str, Any]:
    return {
        "mode": choose.choice(["min", "max"]),
        "factor": choose.choice([0.0, 0.1, 0.3, 0.5, 0.999]),
        "patience": choose.choice([0, 0, 1, 2, 5]),
        "threshold": choose.choice([0.0, 1e-4, 0.1, 1.0]),
        "threshold_mode": choose.choice(["rel", "abs"]),
        "cooldown": choose.choice([0, 0, 1, 3]),
        "min_lr": choose.choice([0.0, 0.01, 0.3]),
        "eps": choose.choice([0.0, 1e-8, 1e-2]),
    }


def torchs(lr: float, given: dict[str, Any]) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=lr), **given)


def metrics(choose: random.Random) -> list[float]:
    pool = [*METRICS, choose.random(), choose.random()]
    return [choose.choice(pool) if choose.random() < 0.7 else choose.random() for _ in range(REPORTS)]


def test_ten_thousand_streams_of_metrics_are_torchs_bit_for_bit(graphs: Any) -> None:
    """By operations that are launched, and by those that a graph repeats."""
    choose = random.Random(0)
    reduced = 0
    for _ in range(SETS):
        given, lr = options(choose), choose.choice([1.0, 0.1, 3e-4])
        schedule = ReduceOnPlateau(Constant(lr), **given)
        table = ScheduleTable(schedule, torch.device("cpu"))
        eager, captured = (table.rows[-1, :2, :, None].expand(-1, -1, STREAMS).clone() for _ in range(2))
        streams = [metrics(choose) for _ in range(STREAMS)]
        theirs = [torchs(lr, given) for _ in streams]
        metric, rate = torch.zeros(STREAMS, dtype=torch.float64), torch.ones(STREAMS, dtype=torch.float64)
        graph, _ = graphs.capture(functools.partial(reports.report, captured, schedule, metric, rate))
        for each in torch.tensor(streams, dtype=torch.float64).T:
            metric.copy_(each)
            reports.report(eager, schedule, metric, rate)
            graph.replay()
            for scheduler, number in zip(theirs, each.tolist(), strict=True):
                scheduler.step(number)
            assert eager[1, reports._FACTOR].tolist() == [s.optimizer.param_groups[0]["lr"] for s in theirs]
        assert torch.equal(captured, eager)
        assert eager[0, 4].tolist() == [s.best for s in theirs]
        assert eager[0, 5].tolist() == [s.num_bad_epochs for s in theirs]
        assert eager[0, 6].tolist() == [s.cooldown_counter for s in theirs]
        reduced += sum(s.optimizer.param_groups[0]["lr"] < lr for s in theirs)
    assert SETS * STREAMS // 2 < reduced < SETS * STREAMS


@pytest.mark.parametrize(
    "inner",
    [
        Constant(0.5),
        Cosine(peak_lr=1.0, total_steps=10),
        Linear(start_lr=0.0, end_lr=1.0, total_steps=4) * Constant(0.5),
        Constant(0.0),
    ],
)
def test_as_a_value_it_is_its_schedule(inner: Schedule) -> None:
    schedule = ReduceOnPlateau(inner, mode="max", every=3)
    assert schedule.values(0, 15) == inner.values(0, 15)
    assert schedule.length == inner.length
    assert (0.5 * schedule).values(0, 15) == (0.5 * inner).values(0, 15)
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert lower(schedule, torch.device("cpu")).shape[0] == len(inner.layers()) + 1


def test_a_factor_scales_what_is_a_rate() -> None:
    assert 2 * ReduceOnPlateau(Constant(1.0), min_lr=0.1, eps=0.01) == ReduceOnPlateau(
        Constant(2.0), min_lr=0.2, eps=0.02
    )


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"schedule": 0.1}, TypeError, r"schedule must be a nexus Schedule.*Constant\(lr\)"),
        (
            {"schedule": ReduceOnPlateau(Constant(1.0))},
            TypeError,
            "must not be a ReduceOnPlateau, which",
        ),
        ({"mode": "least"}, ValueError, "mode must be one of"),
        ({"threshold_mode": "abs "}, ValueError, "threshold_mode must be one of"),
        ({"factor": 1.0}, ValueError, "factor must be a number from 0 to below 1"),
        ({"factor": -0.1}, ValueError, "factor must be a finite number >= 0"),
        ({"patience": -1}, ValueError, "patience must be an int from 0"),
        ({"patience": 1.5}, TypeError, "patience must be an int from 0"),
        ({"cooldown": -1}, ValueError, "cooldown must be an int from 0"),
        ({"every": 0}, ValueError, "every must be an int from 1"),
        ({"min_lr": math.nan}, ValueError, "min_lr must be a finite number"),
        ({"eps": "x"}, TypeError, "eps must be a finite number"),
        (
            {"schedule": Constant(1.0) * Constant(1.0) * Constant(1.0) * Constant(1.0)},
            ValueError,
            "schedule must have at most 3 layers",
        ),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ReduceOnPlateau(**{"schedule": Constant(1.0), **given})


PLATEAU = ReduceOnPlateau(Constant(1.0))


@pytest.mark.parametrize(
    "compose",
    [
        lambda: PLATEAU * Constant(0.5),
        lambda: Constant(0.5) + PLATEAU,
        lambda: join([Constant(0.5), PLATEAU], [3]),
        lambda: PLATEAU.warmup(4),
        lambda: PLATEAU.clip(high=0.5),
        lambda: ScheduleLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), PLATEAU),
    ],
)
def test_it_is_the_outermost(compose: Any) -> None:
    with pytest.raises(TypeError, match="must not be a ReduceOnPlateau"):
        compose()


def test_torchs_are_imported_with_their_numbers() -> None:
    groups = [{"params": [torch.zeros(1)], "lr": lr} for lr in (0.1, 0.2)]
    given = {"mode": "max", "factor": 0.5, "patience": 3, "threshold": 0.1, "threshold_mode": "abs", "cooldown": 2}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=[0.01, 0.02], eps=0.0, **given)
    assert from_torch(scheduler) == [
        ReduceOnPlateau(Constant(lr), min_lr=low, eps=0.0, **given) for lr, low in ((0.1, 0.01), (0.2, 0.02))
    ]
    with pytest.raises(NotImportable, match="leave out exact"):
        from_torch(scheduler, steps=10, exact=True)


def test_a_wsd_inside_is_edited_as_one_by_itself() -> None:
    wsd = WSD(warmup_steps=2, stable_steps=10, decay_steps=4, peak_lr=1.0)
    alone, inside = (ScheduleTable(each, torch.device("cpu")) for each in (wsd, ReduceOnPlateau(wsd)))
    now, rate = torch.tensor(5), torch.tensor(1.0, dtype=torch.float64)
    for table in (alone, inside):
        table.extend_stable(3, now)
        table.begin_decay(now, rate)
    assert torch.equal(alone.rows[0], inside.rows[0])
    assert alone.edits() == inside.edits()
    assert inside.standing() == ReduceOnPlateau(alone.standing())
