"""Compositions for formulas of other packages, at every step; tests/peers has those that install."""

from __future__ import annotations

import pytest

from nexus.schedules import (
    Arc,
    Constant,
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
