"""Compositions with the rates of Megatron's scheduler, at every update."""

from __future__ import annotations

import pytest
from installed import SIZES, WARMUPS, check, driven, peer, two_groups

from nexus.schedules import WSD, Constant, Cosine, InverseSqrt, Linear, join

HIGHS, LOWS, FIRST = (1e-2, 4e-3), (1e-4, 1e-5), 1e-6  # of the two groups; Megatron keeps their bounds in the groups

PAIRS = [(n, warmup) for n in SIZES for warmup in WARMUPS if warmup < n]  # Megatron takes no others


@pytest.fixture(scope="module")
def megatron():
    return peer("megatron.core.optimizer_param_scheduler")


def rates(megatron, n, warmup, style, **more):
    optimizer = two_groups(max_lr=HIGHS[1], min_lr=LOWS[1])
    decay = {"start_wd": 0.1, "end_wd": 0.1, "wd_incr_steps": n, "wd_incr_style": "constant"}
    numbers = (FIRST, HIGHS[0], LOWS[0], warmup, n)
    scheduler = megatron.OptimizerParamScheduler(optimizer, *numbers, style, **decay, **more)
    return driven(optimizer, lambda: scheduler.step(1), n + 20)


def warmed(warmup, falls):
    return [fall.warmup(warmup, start=FIRST) if warmup else fall for fall in falls]


def bounds():
    return zip(HIGHS, LOWS, strict=True)


@pytest.mark.parametrize(("n", "warmup"), PAIRS)
def test_lines_and_cosines(megatron, n, warmup):
    left = n - warmup
    check(warmed(warmup, map(Constant, HIGHS)), rates(megatron, n, warmup, "constant"))
    lines = [Linear(start_lr=high, end_lr=low, total_steps=left) for high, low in bounds()]
    check(warmed(warmup, lines), rates(megatron, n, warmup, "linear"))
    falls = [Cosine(peak_lr=high, total_steps=left, min_lr=low) for high, low in bounds()]
    check(warmed(warmup, falls), rates(megatron, n, warmup, "cosine"))


@pytest.mark.parametrize("kind", ["linear", "cosine", "exponential", "minus_sqrt"])
@pytest.mark.parametrize(("n", "warmup"), PAIRS)
def test_warmup_stable_decay(megatron, n, warmup, kind):
    decay = max(1, n // 3)
    ours = {"minus_sqrt": "sqrt"}.get(kind, kind)
    falls = [
        WSD(
            warmup_steps=0,
            stable_steps=n - warmup - decay,
            decay_steps=decay,
            peak_lr=high,
            min_lr=low,
            decay_type=ours,
        )
        for high, low in bounds()
    ]
    real = rates(megatron, n, warmup, "WSD", wsd_decay_steps=decay, lr_wsd_decay_style=kind)
    check(warmed(warmup, falls), real)


@pytest.mark.parametrize(("n", "warmup"), PAIRS)
def test_inverse_sqrt(megatron, n, warmup):
    """Past the last step, the least rate is in force at once; without a warm-up, steps 0 and 1 have the same."""
    late = max(0, 1 - warmup)
    ours = []
    for high, low in bounds():
        falling = InverseSqrt(peak_lr=high, timescale=max(1, warmup)).clip(low)
        parts = [*([Constant(high)] if late else []), falling]
        ours.append(join([*parts, Constant(low)], [*([late] if late else []), n + 1 - warmup]))
    check(warmed(warmup, ours), rates(megatron, n, warmup, "inverse-square-root"))


def test_ends_of_inverse_sqrt(megatron):
    first = [each[0] for each in rates(megatron, 10, 0, "inverse-square-root")]
    assert first[:3] == pytest.approx([1e-2, 1e-2, 1e-2 / 2**0.5])
    assert first[10:12] == pytest.approx([1e-2 / 10**0.5, 1e-4])


def test_a_warmup_is_shorter_than_the_whole(megatron):
    with pytest.raises(AssertionError):
        next(rates(megatron, 13, 13, "linear"))
