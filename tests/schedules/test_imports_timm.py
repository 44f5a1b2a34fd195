"""from_timm against timm's own objects, at every time."""

from __future__ import annotations

import pytest
import torch

from nexus.schedules import from_timm
from nexus.schedules.imports import ImportMismatch, NotImportable

timm = pytest.importorskip("timm.scheduler", reason="the real objects are timm's own")

CASES = {
    "cosine": ("CosineLRScheduler", {"lr_min": 1e-5}),
    "cosine cycles": ("CosineLRScheduler", {"cycle_limit": 3, "cycle_decay": 0.5}),
    "cosine k": ("CosineLRScheduler", {"k_decay": 1.5, "lr_min": 1e-5, "cycle_limit": 2}),
    "tanh": ("TanhLRScheduler", {"lr_min": 1e-5, "cycle_limit": 2, "cycle_decay": 0.7}),
    "poly": ("PolyLRScheduler", {"power": 0.9, "lr_min": 1e-5, "k_decay": 0.7}),
    "poly cycles": ("PolyLRScheduler", {"cycle_limit": 3}),
}


def two_groups():
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 3e-3, "lr_scale": 0.5}]
    return torch.optim.SGD(groups, lr=1.0)


def compare(scheduler, steps):
    schedules = from_timm(scheduler, steps=steps)
    for t in range(steps + 1):
        scheduler.step(t)
        for schedule, group in zip(schedules, scheduler.optimizer.param_groups, strict=True):
            assert abs(schedule(t) - group["lr"]) <= 1e-11 * group["lr"] + 1e-16, (t, schedule)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("n", [2, 10, 113, 1000, 1001])
@pytest.mark.parametrize("name", CASES)
def test_each_class_at_every_time(name, n, warmup, prefix):
    kind, kwargs = CASES[name]
    scheduler = getattr(timm, kind)(two_groups(), n, warmup_t=warmup, warmup_prefix=prefix, **kwargs)
    compare(scheduler, 3 * n + 30)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 13])
def test_steps_and_milestones(warmup, prefix):
    warm = {"warmup_t": warmup, "warmup_lr_init": 1e-4, "warmup_prefix": prefix}
    compare(timm.StepLRScheduler(two_groups(), 2.4, 0.9, **warm), 200)
    compare(timm.StepLRScheduler(two_groups(), 30, 0.1, **warm), 200)
    compare(timm.MultiStepLRScheduler(two_groups(), [1, 20, 20, 50], 0.3, **warm), 100)


def test_cycles_that_double():
    compare(timm.CosineLRScheduler(two_groups(), 10, cycle_mul=2.0, cycle_limit=8, lr_min=1e-5), 3000)


def test_a_restart_found_by_a_logarithm_is_one_step_late():
    # Cycle 5 begins at 10 (3**5 - 1) / 2, but math.log(3**5, 3) rounds below 5: see docs/peers.md.
    scheduler = timm.CosineLRScheduler(two_groups(), 10, cycle_mul=3.0, cycle_limit=8, lr_min=1e-5)
    with pytest.raises(ImportMismatch, match="at step 1210, group 0"):
        from_timm(scheduler)
    exact = from_timm(scheduler, steps=1300, exact=True)
    scheduler.step(1210)
    assert exact[0](1210) == scheduler.optimizer.param_groups[0]["lr"] == 1e-5


def test_what_has_no_schedule_is_refused():
    with pytest.warns(FutureWarning):
        plateau = timm.PlateauLRScheduler(two_groups())
    with pytest.raises(NotImportable, match="metric-driven"):
        from_timm(plateau)
    with pytest.raises(NotImportable, match="one of timm's"):
        from_timm(object())


def test_noise_is_followed_by_a_table():
    scheduler = timm.CosineLRScheduler(two_groups(), 50, noise_range_t=(10, 20))
    with pytest.raises(NotImportable, match="noise"):
        from_timm(scheduler)
    schedules = from_timm(scheduler, steps=60, exact=True)
    for t in range(60):
        scheduler.step(t)
        assert [each(t) for each in schedules] == [group["lr"] for group in scheduler.optimizer.param_groups]
