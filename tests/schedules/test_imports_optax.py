"""from_optax: tables of any callable; and of optax's own functions where optax is installed."""

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


def test_optax_functions_at_every_step():
    optax = pytest.importorskip("optax", reason="the functions are optax's own")
    for fn in (
        optax.warmup_cosine_decay_schedule(0.0, 1e-2, 13, 113, 1e-4),
        optax.linear_schedule(1e-2, 0.0, 100),
        optax.sgdr_schedule([{"init_value": 0.0, "peak_value": 1e-2, "warmup_steps": 3, "decay_steps": 50}] * 2),
    ):
        schedule = from_optax(fn, steps=130)
        assert all(schedule(step) == float(fn(step)) for step in range(131))
