"""One composition for each formula of packages that are not among the tests' requirements, at every step."""

from __future__ import annotations

import math

import pytest

from nexus.schedules import (
    WSD,
    Arc,
    Constant,
    Exponential,
    InverseSqrt,
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


def rise_by_log(t, w):
    """DeepSpeed's WarmupLR, of the type "log"."""
    return math.log(t + 1) / math.log(w) if t < w else 1.0


def log_rise(w):
    return Arc("log", HIGH, LOW, span=1.0, shift=1.0, k=1.0 / math.log(w))


@pytest.mark.parametrize("w", [2, 13])
@pytest.mark.parametrize("n", [113, 1000, 1001])
def test_deepspeed(n, w):
    check(join([log_rise(w), Constant(HIGH)], [w]), lambda t: LOW + (HIGH - LOW) * rise_by_log(t, w), n)

    def decay(t):
        return LOW + (HIGH - LOW) * (rise_by_log(t, w) if t < w else max(0.0, (n - t) / max(1.0, n - w)))

    check(join([log_rise(w), Linear(HIGH, LOW, n - w)], [w]), decay, n + 20)

    def cosine(t):
        if t < w:
            return HIGH * (0.01 + 0.99 * rise_by_log(t, w))
        return HIGH * max(0.0, 0.01 + 0.99 * (1 + math.cos(math.pi * (t - w + 1) / (n - w))) / 2)

    check(join([log_rise(w), Arc("cosine", HIGH, 0.01 * HIGH, float(n - w), shift=1.0)], [w]), cosine, n + 20)


def test_deepspeed_by_hand():
    schedule = join([log_rise(4), Constant(HIGH)], [4])
    assert schedule.values(0, 6) == pytest.approx([LOW, (HIGH + LOW) / 2, 0.007945564378, HIGH, HIGH, HIGH], rel=1e-9)


MEGATRON_DECAYS = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "exponential": lambda r: 2.0 * math.pow(0.5, r) - 1.0,
    "sqrt": lambda r: 1.0 - math.sqrt(r),
}


@pytest.mark.parametrize("kind", MEGATRON_DECAYS)
@pytest.mark.parametrize("n", [113, 1001])
@pytest.mark.parametrize("warmup", [1, 13])
def test_megatron(warmup, n, kind):
    shape, decay = MEGATRON_DECAYS[kind], n // 3

    def wsd(t):
        if t <= warmup:
            return HIGH * t / warmup
        if t > n:
            return LOW
        return LOW + (HIGH - LOW) * (1.0 if t <= n - decay else shape((t - n + decay) / decay))

    after = WSD(0, n - warmup - decay, decay, HIGH, LOW, kind)
    check(join([Linear(0.0, HIGH, warmup), after], [warmup]), wsd, n + 20)

    def inverse_sqrt(t):
        if t <= warmup:
            return HIGH * t / warmup
        return LOW if t > n else max(LOW, HIGH * math.sqrt(warmup) / math.sqrt(t))

    falling = InverseSqrt(HIGH, warmup).clip(LOW)
    check(join([Linear(0.0, HIGH, warmup), falling, Constant(LOW)], [warmup, n + 1]), inverse_sqrt, n + 20)


@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("warmup", [1, 13])
def test_torchtitan(warmup, more):
    """torchtitan counts from (t + 1) / W; earlier versions from (t + 1) / (W + 1); decay likewise."""
    stable, decay, least = 50, 40, 0.1

    def factor(t):
        if t < warmup:
            return (t + 1) / (warmup + more)
        if t < warmup + stable:
            return 1.0
        return least + (1.0 - least) * (1.0 - (t + 1 - warmup - stable) / (decay + more))

    falling = Arc("linear", HIGH, least * HIGH, float(decay + more), shift=1.0)
    count = ("(t+1)/W", "(t+1)/(W+1)")[more]
    ours = join([Constant(HIGH), falling], [stable]).warmup(warmup, count=count)
    check(ours, lambda t: HIGH * factor(t), warmup + stable + decay)


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
