"""What torch's and transformers' schedulers compute where their formula says something else: see docs/peers.md."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from nexus.schedules import Sampled, from_torch


def one_group():
    return torch.optim.SGD([torch.zeros(1)], lr=0.1)


def test_a_restart_found_by_a_logarithm_is_one_step_late():
    scheduler = theirs.CosineAnnealingWarmRestarts(one_group(), 10, 3)
    (schedule,) = from_torch(scheduler)
    assert schedule(1210) == 0.1  # 10 (3**5 - 1) / 2 steps: cycle 5 begins
    scheduler.step(1210)  # with the epoch given, torch finds the cycle by math.log(..., 3)
    assert scheduler.get_last_lr() == [0.0]


def test_a_cosine_by_recursion_drifts():
    scheduler = theirs.CosineAnnealingLR(one_group(), 1000)
    (schedule,) = from_torch(scheduler)
    (table,) = from_torch(scheduler, steps=2000, exact=True)
    assert isinstance(table, Sampled)
    differing = sum(schedule(step) != table(step) for step in range(1000))
    assert differing > 500
    assert all(abs(schedule(step) - table(step)) < 1e-16 for step in range(1001))


def test_a_constant_factor_of_0_never_ends():
    optimizer = one_group()
    scheduler = theirs.ConstantLR(optimizer, 0.0, 2)
    optimizer.step()
    scheduler.step()
    with pytest.raises(ZeroDivisionError):
        scheduler.step()


def test_one_cycle_raises_past_its_end():
    optimizer = one_group()
    scheduler = theirs.OneCycleLR(optimizer, 0.1, 10)
    (schedule,) = from_torch(scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(10):
            scheduler.step()
        assert scheduler.get_last_lr()[0] != schedule(10)  # past the end the half-cosine turns, for one step
        with pytest.raises(ValueError, match="Tried to step 11 times"):
            scheduler.step()
    assert schedule(10) == schedule(9)


def test_transformers_cosine_rises_past_the_last_step():
    transformers = pytest.importorskip("transformers", reason="the real objects are transformers' own")
    optimizer = one_group()
    (schedule,) = from_torch(transformers.get_cosine_schedule_with_warmup(optimizer, 0, 100))
    assert schedule(100) == pytest.approx(0.0, abs=1e-16)
    assert schedule(200) == pytest.approx(0.1)
