"""What the schedulers refuse, and what an error leaves behind: nothing."""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_schedulers import GIVEN, Run, attach, both
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nexus.schedules import Constant, Cosine, CosineRestarts
from nexus.training.schedulers import CosineAnnealingScheduler, CosineRestartScheduler, ScheduleLR, WSDScheduler

Attach = Callable[[Optimizer], LRScheduler]
SCHEDULERS: list[Attach] = [
    lambda optimizer: attach(optimizer, GIVEN),
    lambda optimizer: attach(optimizer, CosineRestarts(peak_lr=1.0)),
    lambda optimizer: attach(optimizer, Cosine(peak_lr=1.0, total_steps=9, warmup_steps=2)),
    lambda optimizer: CosineAnnealingScheduler(optimizer, warmup_steps=2, total_steps=9),
    lambda optimizer: ScheduleLR(optimizer, Constant(0.5)),
]


def torchs(optimizer: Optimizer) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 1.0)


def test_two_drivers_are_refused() -> None:
    optimizer = Run("FusedAdamW").optimizer

    def still_refused() -> None:
        with pytest.raises(RuntimeError, match=r"WSDScheduler drives this.*Attach one of the two alone"):
            torchs(optimizer)

    still_refused()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    for wrong, error, name in ((5, KeyError, "initial_lr"), (-2, ValueError, "last_epoch")):
        with pytest.raises(error, match=name):
            CosineRestartScheduler(optimizer, peak_lr=1.0, last_epoch=wrong)
        still_refused()


@pytest.mark.parametrize("attach", SCHEDULERS)
@pytest.mark.parametrize("assigned", [False, True])
def test_an_optimizer_with_its_own_schedule_takes_no_other(attach: Attach, assigned: bool) -> None:
    schedule = Cosine(peak_lr=1.0, total_steps=9)
    run = Run("FusedAdamW", schedule=None, lr=0.5 if assigned else schedule)
    run.optimizer.param_groups[0]["lr"] = schedule
    with pytest.raises(RuntimeError, match=r"evaluates its own schedule.*Leave the scheduler out, or give"):
        attach(run.optimizer)
    for _ in range(2):
        run.model(torch.ones(3)).sum().backward()
        run.optimizer.step()
    assert run.rates() == [schedule(1)]


@pytest.mark.parametrize("optimizer_first", [True, False])
@both
def test_warnings_are_torchs(kind: str, optimizer_first: bool) -> None:
    def messages(attach: Attach) -> list[tuple[type[Warning], str]]:
        optimizer = Run(kind, schedule=None).optimizer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler = attach(optimizer)
            if optimizer_first:
                optimizer.step()
            scheduler.step()
            scheduler.step()
            scheduler.step(7)
        return [(warning.category, str(warning.message)) for warning in caught]

    expected = messages(torchs)
    assert len(expected) == (1 if optimizer_first else 2)
    assert all(messages(attach) == expected for attach in SCHEDULERS)


@both
def test_an_edit_that_fails_changes_nothing(kind: str) -> None:
    schedule = replace(GIVEN, min_lr=0.0)
    run = Run(kind, schedule=schedule)
    with pytest.raises(ValueError, match="nothing to decay from"):
        run.scheduler.begin_decay()
    for wrong in (-1, 1.5, None):
        with pytest.raises((TypeError, ValueError), match="n must be an int"):
            run.scheduler.extend_stable(wrong)
    assert run.train(20) == schedule.values(0, 20)

    with pytest.raises(ValueError, match="no end to extend"):
        Run(kind, schedule=replace(GIVEN, stable_steps=None)).scheduler.extend_stable(4)


GOOD: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (WSDScheduler, vars(GIVEN)),
    (CosineRestartScheduler, vars(CosineRestarts(peak_lr=1.0))),
    (CosineAnnealingScheduler, {"warmup_steps": 2, "total_steps": 9, "peak_lr": 1.0, "min_lr": 0.0}),
]


@pytest.mark.parametrize(
    ("scheduler", "arguments", "named"),
    [
        *((scheduler, {**good, name: -1}, name) for scheduler, good in GOOD for name in good),
        *((WSDScheduler, {**vars(GIVEN), "last_epoch": wrong}, "last_epoch") for wrong in (-2, 1.5, True, None)),
        *((WSDScheduler, {**vars(GIVEN), "optimizer": wrong}, "optimizer") for wrong in (None, nn.Linear(1, 1))),
        (
            CosineAnnealingScheduler,
            {"warmup_steps": 8, "total_steps": 8},
            "warmup_steps must be less than total_steps=8",
        ),
        (CosineAnnealingScheduler, {"warmup_steps": 8}, "one of total_steps and max_steps"),
        (CosineAnnealingScheduler, {"warmup_steps": 8, "total_steps": 9, "max_steps": 9}, "one of total_steps and"),
    ],
)
@both
def test_bad_arguments(scheduler: Callable[..., Any], arguments: dict[str, Any], named: str, kind: str) -> None:
    run = Run(kind, schedule=None)
    with pytest.raises((TypeError, ValueError), match=rf"^{named}\b.*got"):
        scheduler(**{"optimizer": run.optimizer, **arguments})
    assert run.rates() == [0.5]
    assert "initial_lr" not in run.optimizer.param_groups[0]


@pytest.mark.parametrize(
    ("scheduler", "arguments", "call"),
    [
        (WSDScheduler, (2, 5, 4, 1.0), "WSDScheduler(optimizer, warmup_steps=..., stable_steps=..., "),
        (CosineRestartScheduler, (1.0,), "CosineRestartScheduler(optimizer, peak_lr=..., min_lr=0.0, "),
        (CosineAnnealingScheduler, (2, 9), "CosineAnnealingScheduler(optimizer, warmup_steps=..., total_steps="),
        (ScheduleLR, (GIVEN, 3), "ScheduleLR(optimizer, schedule, last_epoch=-1)"),
    ],
)
def test_arguments_that_are_easy_to_swap_need_their_names(
    scheduler: Callable[..., Any], arguments: tuple[Any, ...], call: str
) -> None:
    optimizer = Run("AdamW", schedule=None).optimizer
    with pytest.raises(TypeError, match=rf"takes its arguments by name.*{re.escape(call)}"):
        scheduler(optimizer, *arguments)
    assert "initial_lr" not in optimizer.param_groups[0]


@pytest.mark.parametrize("name", ["total_steps", "max_steps"])
def test_the_older_name_of_the_total_is_taken(name: str) -> None:
    numbers: dict[str, Any] = {"warmup_steps": 2, name: 9, "peak_lr": 1.0}
    scheduler = CosineAnnealingScheduler(Run("AdamW", schedule=None).optimizer, **numbers)
    assert scheduler.schedule == Cosine(peak_lr=1.0, total_steps=9, warmup_steps=2)


@both
def test_a_bad_scale_is_named(kind: str) -> None:
    run = Run(kind, 1)
    run.optimizer.param_groups[0]["lr_scale"] = math.nan
    with pytest.raises(ValueError, match="lr_scale must be a finite number"):
        run.scheduler.step()


@both
@pytest.mark.parametrize(
    ("wrong", "remedy"),
    [
        (None, r"Constant\(lr\) makes one of a number"),
        (1e-3, r"Constant\(lr\) makes one of a number"),
        (Cosine, r"that is a class: write Cosine\(peak_lr=\.\.\., total_steps=\.\.\., min_lr=0\.0, "),
        (torchs, "Schedule.from_function makes one of a function"),
    ],
    ids=["None", "a rate", "a class", "a function"],
)
def test_a_schedule_is_asked_for_by_name(kind: str, wrong: object, remedy: str) -> None:
    optimizer = Run(kind, schedule=None).optimizer
    with pytest.raises(TypeError, match=f"schedule must be a nexus Schedule, got .*; {remedy}"):
        ScheduleLR(optimizer, wrong)  # type: ignore[type-var]
    assert optimizer.param_groups[0]["lr"] == 0.5
