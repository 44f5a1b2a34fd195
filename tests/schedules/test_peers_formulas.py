"""Compositions for formulas of other packages, at every step; tests/peers has those that install."""

from __future__ import annotations

import pytest

from nexus.schedules import Arc, Constant, join

HIGH = 1e-2


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

    falling = Arc("linear", high=HIGH, low=least * HIGH, span=float(decay + 1), shift=1.0)
    ours = join([Constant(HIGH), falling], [stable]).warmup(warmup, count="(t+1)/(W+1)")
    for t in range(warmup + stable + decay):
        assert ours(t) == pytest.approx(HIGH * factor(t), rel=1e-11), t
    assert ours(warmup - 1) == pytest.approx(HIGH * warmup / (warmup + 1))
