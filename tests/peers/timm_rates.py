"""from_timm against timm's own objects, at every time."""

from __future__ import annotations

import itertools

import pytest
from installed import SIZES, WARMUPS, check, peer, two_groups

from nexus.schedules import WSD, Cosine, Linear, MultiStep, Polynomial, StepDecay, Tanh, from_timm
from nexus.schedules.imports import ImportMismatch, NotImportable

CASES = {
    "cosine": ("CosineLRScheduler", {"lr_min": 1e-5}),
    "cosine cycles": ("CosineLRScheduler", {"cycle_limit": 3, "cycle_decay": 0.5}),
    "cosine k": ("CosineLRScheduler", {"k_decay": 1.5, "lr_min": 1e-5, "cycle_limit": 2}),
    "tanh": ("TanhLRScheduler", {"lr_min": 1e-5, "cycle_limit": 2, "cycle_decay": 0.7}),
    "poly": ("PolyLRScheduler", {"power": 0.9, "lr_min": 1e-5, "k_decay": 0.7}),
    "poly cycles": ("PolyLRScheduler", {"cycle_limit": 3}),
}
STABLE = {
    "constant": {"lr_min": 1e-5, "warmup_lr_init": 1e-6},
    "rsqrt": {"stable_timescale": 20},
    "power": {"stable_timescale": 7.5, "stable_power": 0.3},
}


@pytest.fixture(scope="module")
def timm():
    return peer("timm.scheduler", bare="timm")  # timm's own file imports torchvision, which may be another torch's


def groups_with_a_scale():
    return two_groups(lr_scale=0.5)


def compare(scheduler, times):
    def rates():
        for t in range(times + 1):
            scheduler.step(t)
            yield [group["lr"] for group in scheduler.optimizer.param_groups]

    check(from_timm(scheduler, steps=times), rates())


@pytest.mark.parametrize(("warmup", "prefix"), [(0, False), *itertools.product(WARMUPS[1:], [False, True])])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", CASES)
def test_each_class_at_every_time(timm, name, n, warmup, prefix):
    kind, kwargs = CASES[name]
    scheduler = getattr(timm, kind)(groups_with_a_scale(), n, warmup_t=warmup, warmup_prefix=prefix, **kwargs)
    compare(scheduler, 3 * n + 30)


@pytest.mark.parametrize("decay", ["linear", "1-sqrt", "cosine", "power", "exp"])
@pytest.mark.parametrize("stable", STABLE)
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("n", SIZES)
def test_warmup_stable_decay(timm, n, warmup, stable, decay):
    more = {"stable_fn": stable, "decay_fn": decay, "decay_power": 2.0, **STABLE[stable]}
    scheduler = timm.WSDLRScheduler(groups_with_a_scale(), n, -(-n // 3), warmup_t=warmup, **more)
    compare(scheduler, n + warmup + 20)


@pytest.mark.parametrize("more", [{"decay_fn": lambda p: 1 - p}, {"stable_fn": "rsqrt", "lr_min": 1e-5}])
def test_a_decay_that_only_a_table_follows(timm, more):
    scheduler = timm.WSDLRScheduler(groups_with_a_scale(), 50, 20, warmup_t=5, **more)
    with pytest.raises(NotImportable, match="imported by a table"):
        from_timm(scheduler)
    assert len(from_timm(scheduler, steps=60, exact=True)) == 2


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_steps_and_milestones(timm, warmup, prefix):
    warm = {"warmup_t": warmup, "warmup_lr_init": 1e-4, "warmup_prefix": prefix}
    for every, rate in [(2.4, 0.9), (30, 0.1), *((n, 0.5) for n in SIZES)]:
        compare(timm.StepLRScheduler(groups_with_a_scale(), every, rate, **warm), 200 + int(every))
    compare(timm.MultiStepLRScheduler(groups_with_a_scale(), [1, 20, 20, 50], 0.3, **warm), 100)
    compare(timm.MultiStepLRScheduler(groups_with_a_scale(), [2, 10, 113, 1000, 1001], 0.3, **warm), 1030)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_rows_of_the_docs(timm, warmup):
    """docs/schedules/moving-over.md."""
    n, lr, least = 113, 0.1, 1e-4
    rows = [
        (
            timm.CosineLRScheduler,
            {"t_initial": n, "lr_min": least, "cycle_limit": 2},
            Cosine(peak_lr=lr, total_steps=n, min_lr=least).repeat(2),
        ),
        (
            timm.PolyLRScheduler,
            {"t_initial": n, "power": 2.0, "lr_min": least},
            Polynomial(peak_lr=lr, total_steps=n, power=2.0, min_lr=least),
        ),
        (timm.StepLRScheduler, {"decay_t": 10, "decay_rate": 0.5}, StepDecay(peak_lr=lr, gamma=0.5, every=10)),
        (
            timm.MultiStepLRScheduler,
            {"decay_t": [5, 50], "decay_rate": 0.5},
            MultiStep(peak_lr=lr, milestones=[4, 49], gamma=0.5),
        ),
        (
            timm.TanhLRScheduler,
            {"t_initial": n, "lb": -6.0, "ub": 4.0, "lr_min": least},
            Tanh(peak_lr=lr, total_steps=n, min_lr=least, lower=-6.0, upper=4.0),
        ),
        (
            timm.WSDLRScheduler,
            {"t_initial": n, "decay_t": 30, "lr_min": least},
            WSD(warmup_steps=0, stable_steps=n - 30, decay_steps=30, peak_lr=lr, min_lr=least, decay_type="sqrt"),
        ),
    ]
    for kind, arguments, schedule in rows:
        prefix = {} if kind is timm.WSDLRScheduler else {"warmup_prefix": True}
        optimizer = two_groups()
        scheduler = kind(optimizer, **arguments, warmup_t=warmup, warmup_lr_init=1e-5, **prefix)
        if warmup and kind is timm.TanhLRScheduler:  # the warm-up goes to lr, from where the rate falls a little
            ours = Linear(start_lr=1e-5, end_lr=lr, total_steps=warmup).then(schedule)
        else:
            ours = schedule.warmup(warmup, start=1e-5) if warmup else schedule
        for t in range(n + warmup):
            scheduler.step(t)
            assert ours(t) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-11, abs=1e-16), (t, ours)


def test_cycles_that_double(timm):
    compare(timm.CosineLRScheduler(groups_with_a_scale(), 10, cycle_mul=2.0, cycle_limit=8, lr_min=1e-5), 3000)


def test_a_restart_found_by_a_logarithm_is_one_step_late(timm):
    # Cycle 5 begins at 10 (3**5 - 1) / 2, but math.log(3**5, 3) rounds below 5: see docs/peers.md.
    scheduler = timm.CosineLRScheduler(groups_with_a_scale(), 10, cycle_mul=3.0, cycle_limit=8, lr_min=1e-5)
    with pytest.raises(ImportMismatch, match="at step 1210, group 0"):
        from_timm(scheduler)
    exact = from_timm(scheduler, steps=1300, exact=True)
    scheduler.step(1210)
    assert exact[0](1210) == scheduler.optimizer.param_groups[0]["lr"] == 1e-5


def test_what_has_no_schedule_is_refused(timm):
    with pytest.warns(FutureWarning):
        plateau = timm.PlateauLRScheduler(groups_with_a_scale())
    with pytest.raises(NotImportable, match="metric-driven"):
        from_timm(plateau)
    with pytest.raises(NotImportable, match="one of timm's"):
        from_timm(object())


def test_noise_is_followed_by_a_table(timm):
    scheduler = timm.CosineLRScheduler(groups_with_a_scale(), 50, noise_range_t=(10, 20))
    with pytest.raises(NotImportable, match="noise"):
        from_timm(scheduler)
    schedules = from_timm(scheduler, steps=60, exact=True)
    for t in range(60):
        scheduler.step(t)
        assert [each(t) for each in schedules] == [group["lr"] for group in scheduler.optimizer.param_groups]
