"""from_optax's tables and our own compositions beside optax's functions in float64, at every step."""

from __future__ import annotations

import numpy as np
import pytest
from installed import SIZES, WARMUPS, check, in_turn, peer

from nexus.schedules import (
    Arc,
    Constant,
    Cosine,
    Exponential,
    Linear,
    Piecewise,
    Polynomial,
    StepDecay,
    from_optax,
    join,
)

HIGH, LOW = 1e-2, 1e-4


@pytest.fixture(scope="module")
def optax():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        peer("jax").config.update("jax_enable_x64", True)
        yield peer("optax")


def compare(fn, ours, steps):
    """All steps at once, and always as many, so that jax compiles each operation once."""
    real = peer("jax").vmap(fn)(np.arange(2_100))
    assert real.dtype == np.float64
    check([ours], real[:steps, None].tolist())


@pytest.mark.parametrize("n", SIZES)
def test_decays(optax, n):
    steps = n + 30
    compare(
        optax.linear_schedule(HIGH, LOW, n, 5),
        join([Constant(HIGH), Linear(start_lr=HIGH, end_lr=LOW, total_steps=n)], [5]),
        steps,
    )
    compare(
        optax.polynomial_schedule(HIGH, LOW, 1.5, n),
        Polynomial(peak_lr=HIGH, total_steps=n, power=1.5, min_lr=LOW),
        steps,
    )
    compare(optax.exponential_decay(HIGH, n, 0.9), Exponential(peak_lr=HIGH, gamma=0.9, every=n), steps)
    stairs = optax.exponential_decay(HIGH, n, 0.5, staircase=True, end_value=LOW)
    compare(stairs, StepDecay(peak_lr=HIGH, gamma=0.5, every=n).clip(low=LOW), steps)
    compare(optax.cosine_decay_schedule(HIGH, n, 0.1), Cosine(peak_lr=HIGH, total_steps=n, min_lr=0.1 * HIGH), steps)
    power = join([Arc("cosine", high=HIGH, low=0.1 * HIGH, span=float(n), q=1.7), Constant(0.1 * HIGH)], [n])
    compare(optax.cosine_decay_schedule(HIGH, n, 0.1, exponent=1.7), power, steps)


@pytest.mark.parametrize("n", SIZES)
def test_pieces(optax, n):
    pieces = optax.piecewise_constant_schedule(HIGH, {n: 0.5, n + 7: 0.1})
    compare(pieces, Piecewise([(0, HIGH), (n, 0.5 * HIGH), (n + 7, 0.05 * HIGH)]), n + 30)
    for kind in ("linear", "cosine"):
        between = optax.piecewise_interpolate_schedule(kind, LOW, {n: 100.0, n + 7: 0.1})
        compare(between, Piecewise([(0, LOW), (n, HIGH), (n + 7, 0.1 * HIGH)], kind=kind), n + 30)


@pytest.mark.parametrize("n", [n for n in SIZES if n >= 10])
def test_cycles(optax, n):
    ends = (HIGH / 25, HIGH / 25e4)
    up = int(0.3 * n)
    once = Piecewise([(0, ends[0]), (up, HIGH), (n, ends[1])], kind="cosine")
    compare(optax.cosine_onecycle_schedule(n, HIGH), once, n + 30)
    lines = Piecewise([(0, ends[0]), (up, HIGH), (int(0.85 * n), ends[0]), (n, ends[1])], kind="linear")
    compare(optax.linear_onecycle_schedule(n, HIGH), lines, n + 30)


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("n", SIZES)
def test_warmups(optax, n, warmup):
    steps = n + warmup + 30

    def warmed(fall):
        return in_turn((warmup, lambda: Linear(start_lr=LOW, end_lr=HIGH, total_steps=warmup)), last=fall)

    if warmup:
        compare(
            optax.warmup_constant_schedule(LOW, HIGH, warmup),
            Linear(start_lr=LOW, end_lr=HIGH, total_steps=warmup),
            steps,
        )
    cosine = optax.warmup_cosine_decay_schedule(LOW, HIGH, warmup, warmup + n, 0.1 * HIGH)
    compare(cosine, warmed(Cosine(peak_lr=HIGH, total_steps=n, min_lr=0.1 * HIGH)), steps)
    exponential = optax.warmup_exponential_decay_schedule(LOW, HIGH, warmup, n, 0.5)
    compare(exponential, warmed(Exponential(peak_lr=HIGH, gamma=0.5, every=n)), steps)
    one = {"init_value": LOW, "peak_value": HIGH, "warmup_steps": warmup, "decay_steps": warmup + n}
    twice = join(
        [
            warmed(Cosine(peak_lr=HIGH, total_steps=n, min_lr=0.0)),
            warmed(Cosine(peak_lr=HIGH, total_steps=n, min_lr=0.0)),
        ],
        [warmup + n],
    )
    compare(optax.sgdr_schedule([one, one]), twice, 2 * (n + warmup) + 10)


def test_a_warmup_of_0_steps_never_leaves_its_first_rate(optax):
    assert [float(optax.warmup_constant_schedule(0.0, 1.0, 0)(step)) for step in (0, 1, 100)] == [0.0, 0.0, 0.0]


def test_tables_of_optax_functions(optax):
    restarts = [{"init_value": 0.0, "peak_value": HIGH, "warmup_steps": 3, "decay_steps": 50}] * 2
    for fn in (
        optax.constant_schedule(HIGH),
        optax.warmup_cosine_decay_schedule(0.0, HIGH, 13, 113, LOW),
        optax.linear_schedule(HIGH, 0.0, 100),
        optax.sgdr_schedule(restarts),
    ):
        table = from_optax(fn, steps=130)
        assert table.values(0, 131) == [float(fn(step)) for step in range(131)]
        assert table(1000) == float(fn(130))


def test_a_table_of_float32_has_its_rounding(optax):
    with peer("jax").enable_x64(False):
        table = from_optax(optax.linear_schedule(0.1, 0.0, 10), steps=10)
    assert table.values(0, 2) == [float(np.float32(0.1)), pytest.approx(0.09, rel=1e-7)]


def test_a_compiled_polynomial_may_be_nan_at_its_end(optax):
    # XLA makes 1 - t / 10 of 1 - t * 0.1, with one rounding: below 0 at 10, of which no power is. See docs/peers.md.
    fn = optax.polynomial_schedule(HIGH, LOW, 1.5, 10)
    assert from_optax(fn, steps=12).values(9, 12)[1:] == [LOW, LOW]
    with pytest.raises(ValueError, match="at step 10 must be a finite number >= 0, got nan"):
        from_optax(peer("jax").jit(fn), steps=12)
