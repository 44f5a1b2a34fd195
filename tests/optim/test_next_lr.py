"""What `next_lr` and `completed_steps` say is what the coming update uses, whatever drives the rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import make_params
from side_by_side import train
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, ReduceLROnPlateau

from nexus.optim import FusedAdamW
from nexus.schedules import (
    WSD,
    Clock,
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    Linear,
    ReduceOnPlateau,
    Schedule,
)
from nexus.training.schedulers import WSDScheduler

SHORT = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-3, min_lr=1e-5, decay_type="cosine")


def make(*groups: dict[str, Any], backend: str = "auto", **options: Any) -> FusedAdamW:
    return FusedAdamW(
        [{"params": make_params([(2,)]), **group} for group in groups or ({},)], backend=backend, **options
    )


def assert_foretold(optimizer: FusedAdamW, count: int, between: Callable[[int], object] = lambda step: None) -> None:
    """For each of so many updates, what is foretold is what the groups show after it, bit for bit."""
    for step in range(count):
        done, foretold = optimizer.completed_steps, optimizer.next_lr()
        assert optimizer.next_lr() == foretold
        train(optimizer, 1)
        assert [float(group["lr"]) for group in optimizer.param_groups] == foretold, step
        assert (done, optimizer.completed_steps) == (step, step + 1)
        between(step)


@pytest.mark.parametrize(
    "rate",
    [
        0.5,
        torch.tensor(0.25, dtype=torch.float64),
        SHORT,
        CosineRestarts(peak_lr=1e-3, cycle_length=5, cycle_mult=2.0, warmup_steps=2),
        Cosine(peak_lr=1e-3, total_steps=12) * Exponential(peak_lr=1.0, gamma=0.9),
        ReduceOnPlateau(SHORT),
    ],
    ids=["float", "tensor", "WSD", "restarts", "product", "plateau"],
)
def test_the_rate_is_that_of_the_coming_update(backend: str, rate: float | torch.Tensor | Schedule) -> None:
    optimizer = make({}, {"lr": 0.125}, {"lr": SHORT, "lr_scale": 0.3}, backend=backend, lr=rate)
    assert_foretold(optimizer, 14)


def test_scales_that_move() -> None:
    scale = torch.tensor(0.5)
    falling = Linear(start_lr=1.0, end_lr=0.25, total_steps=8)
    optimizer = make({"lr_scale": falling}, {"lr_scale": scale}, lr=SHORT)

    def write(step: int) -> None:
        scale.fill_(1.0 / (step + 1))

    assert_foretold(optimizer, 10, write)


def test_a_clock_and_edits_and_reports() -> None:
    tokens = Clock()
    line = Linear(start_lr=1.0, end_lr=0.0, total_steps=1000)
    plateau = ReduceOnPlateau(Constant(0.5), patience=0)
    optimizer = make({"lr": line.at(tokens)}, {"lr": plateau}, lr=SHORT)

    def act(step: int) -> None:
        optimizer.advance(tokens, 7 * step)
        optimizer.report(torch.tensor(float(step)))
        if step == 2:
            optimizer.begin_decay(4, to=1e-4)
        if step == 8:
            optimizer.replace(Cosine(peak_lr=1e-2, total_steps=5))

    assert_foretold(optimizer, 16, act)


def test_an_assigned_schedule_and_one_that_writes_for_another_group() -> None:
    optimizer = make({}, {}, lr=SHORT)
    first, second = optimizer.param_groups
    second["lr_schedule"], second["lr"] = None, first["lr"]
    assert_foretold(optimizer, 4)
    first["lr"] = Linear(start_lr=1.0, end_lr=0.5, total_steps=10)
    assert optimizer.next_lr()[0] == 1.0 - 4 * 0.05


@pytest.mark.parametrize(
    "attach",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, 10),
        lambda optimizer: ExponentialLR(optimizer, 0.5),
        lambda optimizer: WSDScheduler(optimizer, warmup_steps=2, stable_steps=3, decay_steps=4, peak_lr=1e-3),
    ],
    ids=["CosineAnnealingLR", "ExponentialLR", "WSDScheduler"],
)
def test_schedulers_that_write_the_rate(attach: Callable[[FusedAdamW], Any]) -> None:
    optimizer = make({"lr_scale": 1.0}, {}, lr=0.5)
    scheduler = attach(optimizer)
    for step in range(12):
        assert optimizer.next_lr() == pytest.approx(scheduler.get_last_lr(), rel=1e-14)
        train(optimizer, 1)
        scheduler.step()
        assert optimizer.completed_steps == step + 1


def test_torchs_plateau_and_a_schedule_taken_over() -> None:
    optimizer = make(lr=0.5)
    plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for metric in (1.0, 2.0):
        plateau.step(metric)
    assert optimizer.next_lr() == [0.25]

    optimizer = make(lr=1.0)
    optimizer.take_over(ExponentialLR(optimizer, 0.5))
    assert_foretold(optimizer, 3)
    assert optimizer.next_lr() == [0.125]


def test_skipped_steps_do_not_count() -> None:
    optimizer = make(lr=SHORT, skip_nonfinite=True)
    weight = optimizer.param_groups[0]["params"][0]
    for value, done in ((1.0, 1), (float("nan"), 1), (1.0, 2)):
        weight.grad = torch.full_like(weight, value)
        optimizer.step()
        assert optimizer.completed_steps == done
        assert optimizer.next_lr() == [pytest.approx(SHORT(done))]


def test_a_loaded_state_goes_on_where_it_was() -> None:
    optimizer, other = make(lr=SHORT), make(lr=SHORT)
    train(optimizer, 9)
    other.load_state_dict(optimizer.state_dict())
    assert other.completed_steps == optimizer.completed_steps == 9
    assert other.next_lr() == optimizer.next_lr()
