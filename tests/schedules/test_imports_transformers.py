"""from_transformers against every name of get_scheduler, at every step."""

from __future__ import annotations

import pytest
import torch

from nexus.schedules import Constant, ReduceOnPlateau, Sampled, from_torch, from_transformers
from nexus.schedules.imports import NotImportable

transformers = pytest.importorskip("transformers", reason="the real objects are transformers' own")

CASES = {
    "linear": [{}],
    "cosine": [{}, {"num_cycles": 2.5}, {"num_cycles": 0.3}],
    "cosine_with_restarts": [{}, {"num_cycles": 2}],
    "polynomial": [{}, {"power": 2.0, "lr_end": 1e-5}, {"power": 0.5}],
    "constant": [{}],
    "constant_with_warmup": [{}],
    "inverse_sqrt": [{}, {"timescale": 40}],
    "cosine_with_min_lr": [{"min_lr": 1e-4}, {"min_lr_rate": 0.1, "num_cycles": 1.5}],
    "cosine_warmup_with_min_lr": [{"min_lr": 1e-4}, {"min_lr_rate": 0.1, "warmup_lr_rate": 0.05}],
    "warmup_stable_decay": [
        {"num_decay_steps": 20, "warmup_type": warmup, "decay_type": decay, "min_lr_ratio": 0.1}
        for warmup, decay in (("linear", "cosine"), ("cosine", "1-sqrt"), ("1-sqrt", "linear"))
    ],
}
EACH = [(name, kwargs) for name, all_kwargs in CASES.items() for kwargs in all_kwargs]


def real_rates(name, lr, warmup, n, kwargs, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, n, dict(kwargs) or None)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("n", [1, 2, 10, 113, 1000, 1001])
@pytest.mark.parametrize(("name", "kwargs"), EACH)
def test_each_name_at_every_step(name, kwargs, n, warmup):
    steps = n + warmup + 30
    if name == "warmup_stable_decay":
        kwargs, n = {**kwargs, "num_stable_steps": n}, None  # both raise a warning of transformers'
    if name == "polynomial" and n == warmup:
        with pytest.raises(ZeroDivisionError):  # transformers' own
            real_rates(name, 1e-2, warmup, n, kwargs, steps)
        return
    schedule = from_transformers(name, 1e-2, num_warmup_steps=warmup, num_training_steps=n, steps=steps, **kwargs)
    assert not isinstance(schedule, Sampled)
    for step, real in enumerate(real_rates(name, 1e-2, warmup, n, kwargs, steps)):
        assert abs(schedule(step) - real) <= 1e-11 * real + 1e-17, (step, real, schedule(step), schedule)


@pytest.mark.parametrize("warmup", [0, 1, 13])
@pytest.mark.parametrize("n", [1, 2, 10, 113, 1000, 1001])
@pytest.mark.parametrize(("name", "kwargs"), EACH)
def test_two_groups_at_every_step(name, kwargs, n, warmup):
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 3e-3}]
    optimizer, steps = torch.optim.SGD(groups, lr=0.1), n + warmup + 30
    if name == "warmup_stable_decay":
        kwargs, n = {**kwargs, "num_stable_steps": n}, None
    scheduler = transformers.get_scheduler(name, optimizer, warmup, n, dict(kwargs) or None)
    if name == "polynomial" and n == warmup:
        with pytest.raises(ZeroDivisionError):  # transformers' own
            from_torch(scheduler, steps=steps)
        return
    schedules = from_torch(scheduler, steps=steps)
    assert not any(isinstance(schedule, Sampled) for schedule in schedules)
    for step in range(steps):
        for schedule, group in zip(schedules, optimizer.param_groups, strict=True):
            assert abs(schedule(step) - group["lr"]) <= 1e-11 * group["lr"] + 1e-16, (step, schedule, group["lr"])
        optimizer.step()
        scheduler.step()


def test_the_names_are_all_of_them():
    names = {str(each.value) for each in transformers.SchedulerType}
    assert names - set(CASES) == {"reduce_lr_on_plateau", "greedy"}


def test_a_metric_driven_name_is_refused():
    with pytest.raises(NotImportable, match="'greedy' is metric-driven"):
        from_transformers("greedy", 1e-2)


def test_a_plateau_is_one():
    expected = ReduceOnPlateau(Constant(1e-2), factor=0.5, patience=3)
    assert from_transformers("reduce_lr_on_plateau", 1e-2, factor=0.5, patience=3) == expected


def test_an_unknown_name_is_transformers_error():
    with pytest.raises(ValueError, match="is not a valid SchedulerType"):
        from_transformers("no_such", 1e-2)


def test_a_rate_of_0():
    assert from_transformers("constant", 0.0) == Constant(0.0)


def test_groups_of_other_rates_have_another_end():
    # transformers divides lr_end by the optimizer's default rate, not by the group's.
    groups = [{"params": [torch.zeros(1)], "lr": 0.1}, {"params": [torch.zeros(1)], "lr": 3e-3}]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    scheduler = transformers.get_polynomial_decay_schedule_with_warmup(optimizer, 3, 20, lr_end=1e-3)
    schedules = from_torch(scheduler)
    assert [schedule(30) for schedule in schedules] == pytest.approx([0.1 * 2e-3, 3e-3 * 2e-3], rel=1e-14)
