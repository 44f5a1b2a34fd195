"""from_torch against torch's own objects, at every step."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from nexus.schedules import Constant, Linear, Sampled, StepDecay, from_torch
from nexus.schedules.imports import ImportMismatch, NotImportable

LENGTHS = (1, 2, 10, 113, 1000, 1001)

CASES = {
    "linear": lambda o, n: theirs.LinearLR(o, 1 / 3, 1.0, n),
    "linear to 0": lambda o, n: theirs.LinearLR(o, 1.0, 0.0, n),
    "constant": lambda o, n: theirs.ConstantLR(o, 1 / 3, n),
    "step": lambda o, n: theirs.StepLR(o, max(1, n // 7), 0.5),
    "multi step": lambda o, n: theirs.MultiStepLR(o, [n // 2, n // 2, n], 0.3),
    "exponential": lambda o, n: theirs.ExponentialLR(o, 0.97),
    "polynomial": lambda o, n: theirs.PolynomialLR(o, n, 2.5),
    "cosine": lambda o, n: theirs.CosineAnnealingLR(o, n),
    "cosine with a floor": lambda o, n: theirs.CosineAnnealingLR(o, n, 1e-4),
    "equal restarts": lambda o, n: theirs.CosineAnnealingWarmRestarts(o, n),
    "restarts": lambda o, n: theirs.CosineAnnealingWarmRestarts(o, n, 2, 1e-5),
    "cyclic": lambda o, n: theirs.CyclicLR(o, [1e-4, 2e-4], [1e-2, 2e-2], n, 2 * n),
    "cyclic, halved": lambda o, n: theirs.CyclicLR(o, 1e-4, 1e-2, n, mode="triangular2"),
    "cyclic, decayed": lambda o, n: theirs.CyclicLR(o, 1e-4, 1e-2, n, mode="exp_range", gamma=0.99),
}

ONE_CYCLES = {
    "one cycle": {"pct_start": 0.3},
    "one cycle, linear": {"pct_start": 0.25, "anneal_strategy": "linear"},
    "one cycle, three phases": {"pct_start": 0.4, "three_phase": True},
}


def two_groups() -> torch.optim.Optimizer:
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 3e-3}]
    return torch.optim.SGD(groups, lr=1.0, momentum=0.9)


def advance(scheduler):
    scheduler.optimizer.step()
    scheduler.step()


def compare(scheduler, steps):
    """Step the object itself beside its schedules."""
    schedules = from_torch(scheduler, steps=steps)
    peaks = [0.0, 0.0]
    for step in range(steps + 1):
        if step:
            advance(scheduler)
        for i, (schedule, group) in enumerate(zip(schedules, scheduler.optimizer.param_groups, strict=True)):
            real = group["lr"]
            peaks[i] = max(peaks[i], real)
            difference = abs(schedule(step) - real)
            assert difference <= 1e-11 * real + 1e-15 * peaks[i], (step, schedule, real, schedule(step))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_each_class_at_every_step(name, n):
    compare(CASES[name](two_groups(), n), 2 * n + 20)


@pytest.mark.parametrize("n", [10, 113, 1000, 1001])
@pytest.mark.parametrize("name", ONE_CYCLES)
def test_one_cycle_at_every_step(name, n):
    compare(theirs.OneCycleLR(two_groups(), [0.1, 0.3], n, **ONE_CYCLES[name]), n - 1)


@pytest.mark.parametrize("warmup", [1, 13])
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("cyclic")])
def test_each_class_after_a_warmup(name, n, warmup):
    optimizer = two_groups()
    parts = [theirs.LinearLR(optimizer, 0.01, 1.0, warmup), CASES[name](optimizer, n)]
    compare(theirs.SequentialLR(optimizer, parts, [warmup]), n + warmup + 20)


def test_a_chain_is_a_product():
    optimizer = two_groups()
    parts = [theirs.LinearLR(optimizer, 0.1, 1.0, 13), theirs.ExponentialLR(optimizer, 0.99)]
    compare(theirs.ChainedScheduler([*parts, theirs.StepLR(optimizer, 10, 0.5)]), 200)


@pytest.mark.parametrize("name", CASES)
def test_in_mid_run_the_schedules_are_those_of_a_new_object(name):
    new = from_torch(CASES[name](two_groups(), 113))
    scheduler = CASES[name](two_groups(), 113)
    for _ in range(50):
        advance(scheduler)
    before = copy.deepcopy(scheduler.state_dict())
    assert from_torch(scheduler) == new
    after = scheduler.state_dict()
    assert {name: after[name] for name in ("last_epoch", "_last_lr")} == {
        name: before[name] for name in ("last_epoch", "_last_lr")
    }


@pytest.mark.parametrize("done", [0, 5, 12, 13, 14, 60])
def test_a_sequence_in_mid_run(done):
    optimizer = two_groups()
    parts = [theirs.LinearLR(optimizer, 0.01, 1.0, 13), theirs.CosineAnnealingLR(optimizer, 100, 1e-4)]
    scheduler = theirs.SequentialLR(optimizer, parts, [13])
    for _ in range(done):
        advance(scheduler)
    for schedule, group in zip(from_torch(scheduler), optimizer.param_groups, strict=True):
        assert schedule(done) == pytest.approx(group["lr"], rel=1e-12)


def test_a_sequence_with_a_metric_driven_part_is_refused():
    optimizer = two_groups()
    scheduler = theirs.SequentialLR(optimizer, [theirs.StepLR(optimizer, 10)], [])
    scheduler._schedulers = [theirs.ReduceLROnPlateau(optimizer)]
    with pytest.raises(NotImportable, match="metric-driven"):
        from_torch(scheduler)


def test_what_the_schedules_are():
    optimizer = two_groups()
    assert from_torch(theirs.StepLR(optimizer, 10, 0.5)) == [
        StepDecay(peak_lr=0.1, gamma=0.5, every=10),
        StepDecay(peak_lr=3e-3, gamma=0.5, every=10),
    ]
    optimizer = two_groups()
    assert from_torch(theirs.LinearLR(optimizer, 0.5, 1.0, 4))[0] == Linear(start_lr=0.05, end_lr=0.1, total_steps=4)


def test_a_rate_of_0_is_a_constant():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    assert from_torch(theirs.CosineAnnealingLR(optimizer, 10)) == [Constant(0.0)]


def test_a_closure_is_a_table_of_the_steps_given():
    scheduler = theirs.LambdaLR(two_groups(), lambda t: 1.0 / (1 + t))
    with pytest.raises(NotImportable, match="give steps="):
        from_torch(scheduler)
    schedules = from_torch(scheduler, steps=50)
    assert all(isinstance(each, Sampled) for each in schedules)
    assert schedules[0].values(0, 51) == [0.1 * (1.0 / (1 + t)) for t in range(51)]
    assert schedules[0](51) == schedules[0](50)


def test_multiplicative_is_a_table():
    compare(theirs.MultiplicativeLR(two_groups(), lambda t: 0.95), 60)


def test_exact_follows_the_recursion_to_the_bit():
    scheduler = theirs.CosineAnnealingLR(two_groups(), 113)
    schedules = from_torch(scheduler, steps=300, exact=True)
    for step in range(300):
        assert [schedule(step) for schedule in schedules] == [g["lr"] for g in scheduler.optimizer.param_groups]
        advance(scheduler)


def test_a_rate_that_was_changed_by_hand_is_found():
    scheduler = theirs.ExponentialLR(two_groups(), 0.9)
    advance(scheduler)
    scheduler.optimizer.param_groups[1]["lr"] = 1.0
    advance(scheduler)
    with pytest.raises(ImportMismatch, match="at step 2, group 1, the optimizer of the ExponentialLR, as it is now"):
        from_torch(scheduler)


def test_other_classes_are_refused_with_the_remedy():
    class Mine(theirs.StepLR):
        pass

    with pytest.raises(NotImportable, match=r"got Mine; Schedule.from_function"):
        from_torch(Mine(two_groups(), 10))
    with pytest.raises(NotImportable, match="exactly one of"):
        from_torch(object())


def test_importing_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(theirs.StepLR(two_groups(), 10))


def test_a_rate_of_0_that_does_not_stay() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.0)
    (schedule,) = from_torch(theirs.CosineAnnealingLR(optimizer, 10, eta_min=0.1), steps=15)
    assert schedule(10) == 0.1
    (schedule,) = from_torch(theirs.CyclicLR(optimizer, 0.0, 1.0, 10, cycle_momentum=False))
    assert schedule.values(0, 3) == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize("steps", [-1, 0, 2.5, "3", 2**20])
def test_steps_that_are_none(steps: object) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    with pytest.raises((TypeError, ValueError), match="steps must be an int from 1 to 1048575"):
        from_torch(theirs.StepLR(optimizer, 3), steps=steps, exact=True)  # type: ignore[arg-type]


def test_warnings_are_as_they_were() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    scheduler = theirs.CosineAnnealingLR(optimizer, 10)
    optimizer.param_groups[0]["lr"] = 0.05
    before = list(warnings.filters)
    with pytest.raises(ImportMismatch) as held:
        from_torch(scheduler)
    assert warnings.filters == before
    assert held.value is not None
