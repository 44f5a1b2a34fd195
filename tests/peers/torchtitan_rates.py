"""from_torch of torchtitan's schedulers, by what their function is, at every update."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from installed import SIZES, WARMUPS, check, driven, peer, two_groups

from nexus.schedules import Linear, Sampled, from_torch, join


@pytest.fixture(scope="module")
def titan():
    return peer("torchtitan.components.optimizer.lr_scheduler").LRSchedulersContainer


def built(titan, optimizer, steps, **config):
    (scheduler,) = titan.Config(**config).build(optimizers=[optimizer], training_steps=steps)
    return scheduler


@pytest.mark.parametrize("kind", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("decay_ratio", [None, 0.3])
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("n", SIZES)
def test_each_decay_at_every_step(titan, n, warmup, decay_ratio, kind):
    optimizer = two_groups()
    config = {"warmup_steps": warmup, "decay_ratio": decay_ratio, "decay_type": kind, "min_lr_factor": 0.1}
    scheduler = built(titan, optimizer, n, **config)
    schedules = from_torch(scheduler)
    check(schedules, driven(optimizer, scheduler.step, n + 1))
    for schedule in schedules:
        assert not isinstance(schedule, Sampled)
        assert schedule(10 * n) == schedule(n)  # where torchtitan goes below 0, or raises


def test_one_schedule_in_full(titan):
    (schedule, _) = from_torch(built(titan, two_groups(1.0), 10, warmup_steps=4, min_lr_factor=0.4))
    assert schedule.values(0, 12) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4])
    ours = join(
        [Linear(start_lr=0.25, end_lr=1.0, total_steps=3), Linear(start_lr=1.0, end_lr=0.4, total_steps=6)], [4]
    )
    assert schedule.values(0, 12) == pytest.approx(ours.values(0, 12))


def test_a_run_in_its_midst(titan):
    optimizer = two_groups()
    scheduler = built(titan, optimizer, 113, warmup_steps=13)
    for _ in range(70):
        optimizer.step()
        scheduler.step()
    schedules = from_torch(scheduler)
    for schedule, group in zip(schedules, optimizer.param_groups, strict=True):
        assert schedule(70) == pytest.approx(group["lr"], rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("linear", [0.1, 0.0, -0.1]), ("sqrt", [0.0513, 0.0, -0.0488]), ("cosine", [0.0245, 0.0, 0.0245])],
)
def test_past_the_end_torchtitan_leaves_the_least_rate(titan, kind, ends):
    optimizer = two_groups(1.0)
    scheduler = built(titan, optimizer, 10, warmup_steps=0, decay_type=kind)
    real = [rates[0] for rates in driven(optimizer, scheduler.step, 12)]
    assert real[9:] == pytest.approx(ends, abs=1e-4)


def test_past_a_schedule_without_a_decay_torchtitan_raises(titan):
    optimizer = two_groups(1.0)
    scheduler = built(titan, optimizer, 10, warmup_steps=10)
    (schedule, _) = from_torch(scheduler)
    assert schedule(100) == 1.0
    with pytest.raises(AssertionError, match="decay_steps must not be zero"):
        list(driven(optimizer, scheduler.step, 12))


def test_a_partial_of_the_partial(titan):
    scheduler = built(titan, two_groups(), 10, warmup_steps=2)
    known = scheduler.lr_lambdas[0]
    other = torch.optim.lr_scheduler.LambdaLR(two_groups(), partial(known, min_lr_factor=0.5))
    assert not isinstance(from_torch(other)[0], Sampled)  # a partial of a partial is one, with the later argument
    assert from_torch(other)[0](10) == pytest.approx(0.05)
