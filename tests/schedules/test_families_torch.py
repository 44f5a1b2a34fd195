"""Families of schedules against torch's own scheduler objects, at every step."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs

from nexus.schedules import (
    Cosine,
    Cyclic,
    Exponential,
    Linear,
    MultiStep,
    OneCycle,
    Polynomial,
    Schedule,
    StepDecay,
)

PEAK, LOW = 1e-3, 1e-5
LENGTHS = [1, 2, 10, 113, 1000, 1001]
Make = Callable[[int], Schedule]
Torchs = Callable[[Optimizer, int], torchs.LRScheduler]


def used(make: Callable[[Optimizer], torchs.LRScheduler], steps: int) -> list[float]:
    """The rates that `steps` updates use."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for step in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return rates


def one_cycle(optimizer: Optimizer, n: int, **options: object) -> torchs.LRScheduler:
    return torchs.OneCycleLR(optimizer, PEAK, total_steps=n, cycle_momentum=False, **options)


def cyclic(optimizer: Optimizer, n: int, **options: object) -> torchs.LRScheduler:
    return torchs.CyclicLR(optimizer, LOW, PEAK, step_size_up=n, cycle_momentum=False, **options)


ENDLESS: dict[str, tuple[Make, Torchs]] = {
    "LinearLR": (
        lambda n: Linear(start_lr=PEAK / 4, end_lr=PEAK * 0.75, total_steps=n),
        lambda optimizer, n: torchs.LinearLR(optimizer, 0.25, 0.75, n),
    ),
    "LinearLR down": (
        lambda n: Linear(start_lr=PEAK, end_lr=LOW, total_steps=n),
        lambda optimizer, n: torchs.LinearLR(optimizer, 1, 0.01, n),
    ),
    "StepLR": (
        lambda n: StepDecay(peak_lr=PEAK, gamma=0.7, every=n),
        lambda optimizer, n: torchs.StepLR(optimizer, n, 0.7),
    ),
    "MultiStepLR": (
        lambda n: MultiStep(peak_lr=PEAK, milestones=[n, n, 2 * n], gamma=0.3),
        lambda optimizer, n: torchs.MultiStepLR(optimizer, [n, n, 2 * n], 0.3),
    ),
    "ExponentialLR": (
        lambda n: Exponential(peak_lr=PEAK, gamma=1 - 1 / (n + 1)),
        lambda optimizer, n: torchs.ExponentialLR(optimizer, 1 - 1 / (n + 1)),
    ),
    "PolynomialLR": (
        lambda n: Polynomial(peak_lr=PEAK, total_steps=n),
        lambda optimizer, n: torchs.PolynomialLR(optimizer, n),
    ),
    "PolynomialLR 2.5": (
        lambda n: Polynomial(peak_lr=PEAK, total_steps=n, power=2.5),
        lambda optimizer, n: torchs.PolynomialLR(optimizer, n, 2.5),
    ),
    "CyclicLR": (lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=n), cyclic),
    "CyclicLR 7 down": (
        lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=n, down_steps=7),
        partial(cyclic, step_size_down=7),
    ),
    "CyclicLR 2": (
        lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=n, down_steps=None, mode="triangular2"),
        partial(cyclic, mode="triangular2"),
    ),
    "CyclicLR exp": (
        lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=n, down_steps=7, mode="exp_range", gamma=0.999),
        partial(cyclic, step_size_down=7, mode="exp_range", gamma=0.999),
    ),
}
ENDING: dict[str, tuple[Make, Torchs]] = {
    "CosineAnnealingLR": (
        lambda n: Cosine(peak_lr=PEAK, total_steps=n, min_lr=LOW),
        lambda optimizer, n: torchs.CosineAnnealingLR(optimizer, n, LOW),
    ),
    "OneCycleLR": (lambda n: OneCycle(peak_lr=PEAK, total_steps=n), one_cycle),
    "OneCycleLR linear": (
        lambda n: OneCycle(
            peak_lr=PEAK, total_steps=n, up_fraction=0.45, start_factor=0.1, end_factor=0.01, kind="linear"
        ),
        partial(one_cycle, pct_start=0.45, div_factor=10.0, final_div_factor=10.0, anneal_strategy="linear"),
    ),
    "OneCycleLR 3": (
        lambda n: OneCycle(peak_lr=PEAK, total_steps=n, three_phase=True),
        partial(one_cycle, three_phase=True),
    ),
    "OneCycleLR 3 linear": (
        lambda n: OneCycle(peak_lr=PEAK, total_steps=n, up_fraction=0.45, kind="linear", three_phase=True),
        partial(one_cycle, pct_start=0.45, anneal_strategy="linear", three_phase=True),
    ),
    "OneCycleLR down": (
        lambda n: OneCycle(peak_lr=PEAK, total_steps=n, up_fraction=0.0),
        partial(one_cycle, pct_start=0.0),
    ),
    "OneCycleLR up": (
        lambda n: OneCycle(peak_lr=PEAK, total_steps=n, up_fraction=1.0),
        partial(one_cycle, pct_start=1.0),
    ),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ENDLESS)
def test_torchs_rates_at_every_step_and_past_the_end(name: str, length: int) -> None:
    make, torchs_own = ENDLESS[name]
    steps = 3 * length + 20
    expected = used(lambda optimizer: torchs_own(optimizer, length), steps)
    assert make(length).values(0, steps) == pytest.approx(expected, rel=1e-11, abs=1e-15 * PEAK)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ENDING)
def test_torchs_rates_up_to_the_end_that_torch_has(name: str, length: int) -> None:
    make, torchs_own = ENDING[name]
    if name == "OneCycleLR up" and length == 1:
        with pytest.raises(ZeroDivisionError):
            used(lambda optimizer: torchs_own(optimizer, length), length)
        assert make(length).values(0, 3) == [PEAK] * 3
        return
    steps = length + 1 if name == "CosineAnnealingLR" else length
    expected = used(lambda optimizer: torchs_own(optimizer, length), steps)
    assert make(length).values(0, steps) == pytest.approx(expected, rel=1e-11, abs=1e-15 * PEAK)


@pytest.mark.parametrize("seed", range(60))
def test_one_cycles_of_any_fraction_and_length(seed: int) -> None:
    draw = random.Random(seed)
    length, three = draw.randint(3, 60), draw.random() < 0.5
    fraction = draw.choice([draw.random(), (draw.randint(2, length) + 0.25) / (length + 1)])
    fraction = min(fraction, 0.5) if three else fraction
    kind, torchs_kind = draw.choice([("linear", "linear"), ("cosine", "cos")])
    schedule = OneCycle(peak_lr=PEAK, total_steps=length, up_fraction=fraction, kind=kind, three_phase=three)
    options = {"pct_start": fraction, "anneal_strategy": torchs_kind, "three_phase": three}
    expected = used(lambda optimizer: one_cycle(optimizer, length, **options), length)
    assert schedule.values(0, length) == pytest.approx(expected, rel=1e-11, abs=1e-15 * PEAK)


@pytest.mark.parametrize("length", [2, 3, 8, 10, 113])
def test_a_peak_at_step_0_where_torch_divides_by_0(length: int) -> None:
    with pytest.raises(ZeroDivisionError):
        used(lambda optimizer: one_cycle(optimizer, length, pct_start=1 / length), length)
    schedule = OneCycle(peak_lr=PEAK, total_steps=length, up_fraction=1 / length)
    assert schedule(0) == PEAK
    assert schedule(length - 1) == PEAK / 25e4
