"""The evaluators against the oracle on schedules that nobody thought of."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedule_cases import assert_equal_to_oracle, boundaries
from test_schedules import schedules

from nexus.schedules import MAX_STEP, WSD, Constant, Cosine, CosineRestarts, Schedule


@settings(max_examples=300, deadline=None)
@given(schedules, st.lists(st.integers(0, MAX_STEP), max_size=20))
@example(WSD(0, 0, 1, 1.0), [])
@example(WSD(0, None, 1, 1.0), [])
@example(WSD(1, 0, 1, 1.0, 1.0), [])
@example(CosineRestarts(1.0, cycle_length=1, cycle_mult=1.0), [])
@example(CosineRestarts(1.0, cycle_length=1, cycle_mult=3.0), [121])  # pytorch's goes astray there
@example(CosineRestarts(1.0, cycle_length=10, cycle_mult=1.1), [10**8, 10**8 + 1])
@example(Cosine(1.0, 1), [])
@example(Constant(0.3), [])
def test_evaluators_equal_the_oracle(schedule: Schedule, steps: list[int]) -> None:
    assert_equal_to_oracle(schedule, boundaries(schedule) + steps)
