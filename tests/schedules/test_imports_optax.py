"""from_optax: tables of any callable; tests/peers has optax's own functions."""

from __future__ import annotations

import pytest

from nexus.schedules import Sampled, from_optax


def test_any_callable_of_the_step():
    schedule = from_optax(lambda step: 0.1 * 0.5**step, steps=10)
    assert isinstance(schedule, Sampled)
    assert schedule.values(0, 11) == [0.1 * 0.5**step for step in range(11)]
    assert schedule(1000) == schedule(10)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_rates_name_the_step(bad):
    with pytest.raises(ValueError, match="step 3"):
        from_optax(lambda step: bad if step == 3 else 1.0, steps=10)


def test_what_is_no_callable():
    with pytest.raises(TypeError, match="fn must be a callable"):
        from_optax(0.1, steps=10)
