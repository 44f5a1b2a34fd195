"""Compositions for formulas of other packages, at every step; tests/peers has those that install."""

from __future__ import annotations

import math

import pytest

from nexus.schedules import (
    Arc,
    Constant,
    Exponential,
    Linear,
    Piecewise,
    Polynomial,
    StepDecay,
    join,
)

HIGH, LOW = 1e-2, 1e-4


def check(schedule, formula, steps):
    for step in range(steps):
        real = formula(step)
        assert abs(schedule(step) - real) <= 1e-11 * real + 1e-15 * HIGH, (step, schedule(step), real)


@pytest.mark.parametrize("warmup", [1, 13])
def test_torchtitan_before_its_first_release(warmup):
    """Its warm-up and decay were of (t + 1) / (W + 1); today's are in tests/peers."""
    stable, decay, least = 50, 40, 0.1

    def factor(t):
        if t < warmup:
            return (t + 1) / (warmup + 1)
        if t < warmup + stable:
            return 1.0
        return least + (1.0 - least) * (1.0 - (t + 1 - warmup - stable) / (decay + 1))

    falling = Arc("linear", HIGH, least * HIGH, float(decay + 1), shift=1.0)
    ours = join([Constant(HIGH), falling], [stable]).warmup(warmup, count="(t+1)/(W+1)")
    check(ours, lambda t: HIGH * factor(t), warmup + stable + decay)
    assert ours(warmup - 1) == pytest.approx(HIGH * warmup / (warmup + 1))


@pytest.mark.parametrize("warmup", [1, 13])
@pytest.mark.parametrize("n", [113, 1001])
def test_olmo_core(n, warmup):
    def cosine(t):
        if t < warmup:
            return HIGH * t / warmup
        if t >= n:
            return 0.1 * HIGH
        return 0.1 * HIGH + 0.9 * HIGH * (1 + math.cos(math.pi * (t - warmup) / (n - warmup))) / 2

    wave = Arc("cosine", HIGH, 0.1 * HIGH, float(n - warmup))
    check(join([Linear(0.0, HIGH, warmup), wave, Constant(0.1 * HIGH)], [warmup, n]), cosine, n + 20)


@pytest.mark.parametrize("n", [1, 2, 10, 113, 1000, 1001])
def test_keras(n):
    steps = n + 30
    check(Exponential(HIGH, 0.9, n), lambda t: HIGH * 0.9 ** (t / n), steps)
    check(StepDecay(HIGH, 0.9, n), lambda t: HIGH * 0.9 ** (t // n), steps)
    check(Arc("inverse", HIGH, 0.0, n / 0.5), lambda t: HIGH / (1 + 0.5 * t / n), steps)
    check(Polynomial(HIGH, n, 1.5, LOW), lambda t: (HIGH - LOW) * (1 - min(t, n) / n) ** 1.5 + LOW, steps)
    wave = join([Arc("cosine", HIGH, 0.1 * HIGH, float(n)), Constant(0.1 * HIGH)], [n])
    check(wave, lambda t: HIGH * (0.9 * 0.5 * (1 + math.cos(math.pi * min(t, n) / n)) + 0.1), steps)
    # Keras's boundaries belong to the piece before: step <= boundary.
    check(Piecewise([(0, HIGH), (n + 1, LOW)]), lambda t: HIGH if t <= n else LOW, steps)


def test_keras_by_hand():
    assert StepDecay(1.0, 0.5, 10).values(9, 11) == [1.0, 0.5]
    assert Arc("inverse", 1.0, 0.0, 20.0)(20) == 0.5
