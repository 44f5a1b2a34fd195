"""betas_from_torch against torch's own objects, at every step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from nexus.schedules import Sampled, Schedule, betas_from_torch
from nexus.schedules.imports import NotImportable

LENGTHS = (1, 2, 10, 113, 1000)

CASES = {
    "one cycle": lambda o, n: theirs.OneCycleLR(o, 1e-2, total_steps=n),
    "linear": lambda o, n: theirs.OneCycleLR(o, 1e-2, total_steps=n, pct_start=0.25, anneal_strategy="linear"),
    "three phases": lambda o, n: theirs.OneCycleLR(o, 1e-2, total_steps=n, pct_start=0.4, three_phase=True),
    "no way up": lambda o, n: theirs.OneCycleLR(o, 1e-2, total_steps=n, pct_start=0.0),
    "hardly a way down": lambda o, n: theirs.OneCycleLR(o, 1e-2, total_steps=n, pct_start=0.999),
    "of each group": lambda o, n: theirs.OneCycleLR(
        o, 1e-2, total_steps=n, base_momentum=[0.5, 0.8], max_momentum=[0.9, 0.8]
    ),
    "cyclic": lambda o, n: theirs.CyclicLR(o, 1e-4, 1e-2, n, 2 * n),
    "cyclic of each group": lambda o, n: theirs.CyclicLR(
        o, 1e-4, 1e-2, n, base_momentum=[0.0, 0.7], max_momentum=[0.5, 0.95]
    ),
}


def two_groups() -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "betas": (0.8, 0.99)}])


def compare(scheduler, steps, **options):
    """Step the object itself beside its betas."""
    groups = scheduler.optimizer.param_groups
    pairs = betas_from_torch(scheduler, steps=steps, **options)
    assert [beta2 for _, beta2 in pairs] == [0.999, 0.99]
    for step in range(steps + 1):
        if step:
            scheduler.optimizer.step()
            scheduler.step()
        for (beta1, _), group in zip(pairs, groups, strict=True):
            assert isinstance(beta1, Schedule)
            assert beta1(step) == pytest.approx(group["betas"][0], rel=1e-11, abs=1e-15), step
    return pairs


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_the_betas_are_torchs_at_every_step(name, length):
    scheduler = CASES[name](two_groups(), length)
    steps = length - 1 if isinstance(scheduler, theirs.OneCycleLR) else 4 * length
    if steps == 0:
        assert [beta1(0) for beta1, _ in betas_from_torch(scheduler)] == pytest.approx(
            [group["betas"][0] for group in scheduler.optimizer.param_groups]
        )
        return
    pairs = compare(scheduler, steps)
    if isinstance(scheduler, theirs.OneCycleLR):
        assert [beta1(10 * length) for beta1, _ in pairs] == [beta1(steps) for beta1, _ in pairs]  # torch has an end


@pytest.mark.parametrize("mode", ["triangular2", "exp_range"])
def test_what_shrinks_is_a_table(mode):
    scheduler = theirs.CyclicLR(two_groups(), 1e-4, 1e-2, 5, mode=mode, gamma=0.9)
    with pytest.raises(NotImportable, match=rf"by a table \(mode='{mode}'\): give steps="):
        betas_from_torch(scheduler)
    assert all(isinstance(beta1, Sampled) for beta1, _ in compare(scheduler, 40))


def test_a_table_on_request():
    scheduler = theirs.OneCycleLR(two_groups(), 1e-2, total_steps=30)
    assert all(isinstance(beta1, Sampled) for beta1, _ in compare(scheduler, 29, exact=True))


def test_the_object_stays_as_it_is():
    scheduler = theirs.OneCycleLR(two_groups(), 1e-2, total_steps=30)
    for _ in range(7):
        scheduler.optimizer.step()
        scheduler.step()
    before = copy.deepcopy((scheduler.state_dict(), scheduler.optimizer.state_dict()))
    pairs = betas_from_torch(scheduler)
    assert (scheduler.state_dict(), scheduler.optimizer.state_dict()) == before
    now = [group["betas"][0] for group in scheduler.optimizer.param_groups]
    assert [beta1(7) for beta1, _ in pairs] == pytest.approx(now, rel=1e-11)


def test_other_schedulers_leave_the_betas_as_they_are():
    optimizer = two_groups()
    for scheduler in (
        theirs.StepLR(optimizer, 3),
        theirs.OneCycleLR(optimizer, 1e-2, total_steps=9, cycle_momentum=False),
    ):
        assert betas_from_torch(scheduler) == [(0.9, 0.999), (0.8, 0.99)]


def test_what_cannot_be_imported():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0, momentum=0.9)
    with pytest.raises(NotImportable, match="cycles momenta of an optimizer without betas"):
        betas_from_torch(theirs.OneCycleLR(optimizer, 1e-2, total_steps=9))
    optimizer = two_groups()
    parts = [theirs.OneCycleLR(optimizer, 1e-2, total_steps=9), theirs.StepLR(optimizer, 3)]
    with pytest.raises(
        NotImportable, match=r"a OneCycleLR within the SequentialLR cycles betas.*cycle_momentum=False"
    ):
        betas_from_torch(theirs.SequentialLR(optimizer, parts, [9]))
