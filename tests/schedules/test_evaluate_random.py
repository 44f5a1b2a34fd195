"""The evaluators against the oracle on schedules that nobody thought of."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedule_cases import assert_equal_to_oracle, boundaries

from nexus.schedules import MAX_STEP, WSD, Constant, Cosine, CosineRestarts, Schedule

COUNTS = st.one_of(st.integers(0, 50), st.integers(0, 10**6), st.integers(0, MAX_STEP))
LENGTHS = st.one_of(st.integers(1, 50), st.integers(1, 10**6), st.integers(1, MAX_STEP))
PEAKS = st.floats(1e-8, 10.0)
SHARES = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))  # of the peak: the minimum


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    peak = draw(PEAKS)
    low = min(peak, peak * draw(SHARES))
    kind = draw(st.sampled_from([WSD, CosineRestarts, Cosine, Constant]))
    if kind is WSD:
        stable = draw(st.one_of(st.none(), COUNTS))
        curve = draw(st.sampled_from(["linear", "cosine", "sqrt"]))
        return WSD(draw(COUNTS), stable, draw(LENGTHS), peak, low, curve)
    if kind is CosineRestarts:
        mult = draw(st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0]))
        return CosineRestarts(peak, low, draw(LENGTHS), mult, draw(COUNTS))
    if kind is Cosine:
        total = draw(LENGTHS)
        return Cosine(peak, total, low, draw(st.integers(0, total - 1)))
    return Constant(peak)


@settings(max_examples=300, deadline=None)
@given(schedules(), st.lists(st.integers(0, MAX_STEP), max_size=20))
@example(WSD(0, 0, 1, 1.0), [])
@example(WSD(0, None, 1, 1.0), [])
@example(WSD(1, 0, 1, 1.0, 1.0), [])
@example(CosineRestarts(1.0, cycle_length=1, cycle_mult=1.0), [])
@example(CosineRestarts(1.0, cycle_length=1, cycle_mult=3.0), [121])  # pytorch's goes astray there
@example(CosineRestarts(1.0, cycle_length=10, cycle_mult=1.1), [10**8, 10**8 + 1])
@example(Cosine(1.0, 1), [])
def test_evaluators_equal_the_oracle(schedule: Schedule, steps: list[int]) -> None:
    assert_equal_to_oracle(schedule, boundaries(schedule) + steps)
