"""Compositions with the rates of DeepSpeed's schedulers, at every update."""

from __future__ import annotations

import math

import pytest
import torch
from installed import SIZES, check, driven, peer, two_groups

from nexus.schedules import Arc, Constant, Linear, Piecewise, join

LOW = 1e-4
HIGHS = (0.1, 3e-3)  # of the two groups


@pytest.fixture(scope="module")
def deepspeed():
    return peer("deepspeed.runtime.lr_schedules")


def rise(kind, w, high, low=LOW):
    if kind == "linear":
        return Linear(start_lr=low, end_lr=high, total_steps=w)
    return Arc("log", high=high, low=low, span=1.0, shift=1.0, k=1.0 / math.log(w))


def a_step_late(first, schedule):
    """DeepSpeed's rate of step 0 is that of the first update and of the second: see docs/peers.md."""
    return join([Constant(first), schedule], [1])


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("warmup", [1, 13])
@pytest.mark.parametrize("n", SIZES)
def test_warmups(deepspeed, n, warmup, kind):
    w = max(2, warmup)  # as DeepSpeed counts: see docs/peers.md
    more = {"warmup_num_steps": warmup, "warmup_type": kind}
    highs = {"warmup_min_lr": LOW, "warmup_max_lr": list(HIGHS)}

    optimizer = two_groups(*HIGHS)
    scheduler = deepspeed.WarmupLR(optimizer, **highs, **more)
    ours = [a_step_late(LOW, join([rise(kind, w, high), Constant(high)], [w])) for high in HIGHS]
    check(ours, driven(optimizer, scheduler.step, n + 20))

    optimizer = two_groups(*HIGHS)
    scheduler = deepspeed.WarmupDecayLR(optimizer, n, **highs, **more)
    fall = [Linear(start_lr=high, end_lr=LOW, total_steps=n - w) if n > w else Constant(LOW) for high in HIGHS]
    ours = [
        a_step_late(LOW, join([rise(kind, w, high), after], [w])) for high, after in zip(HIGHS, fall, strict=True)
    ]
    check(ours, driven(optimizer, scheduler.step, n + 20))


@pytest.mark.parametrize("kind", ["log", "linear"])
@pytest.mark.parametrize("warmup", [1, 13])
@pytest.mark.parametrize("n", SIZES)
def test_warmup_and_cosine(deepspeed, n, warmup, kind):
    w = max(2, warmup)
    optimizer = two_groups(*HIGHS)
    ratios = {"warmup_min_ratio": 0.02, "cos_min_ratio": 0.01}
    scheduler = deepspeed.WarmupCosineLR(optimizer, n, warmup_num_steps=warmup, warmup_type=kind, **ratios)
    ours = []
    for high in HIGHS:
        # Another step early: the cosine is at (t + 1 - W) / (N - W), and so never at the peak.
        wave = [(w, Arc("cosine", high=high, low=0.01 * high, span=float(n - w), shift=1.0))] if n > w + 1 else []
        parts = [(0, rise(kind, w, high, 0.02 * high)), *wave, (max(w, n - 1), Constant(0.01 * high))]
        joined = join([part for _, part in parts], [start for start, _ in parts[1:]])
        ours.append(a_step_late(0.0, joined))
    check(ours, driven(optimizer, scheduler.step, n + 20))


@pytest.mark.parametrize("n", SIZES)
def test_cycle(deepspeed, n):
    optimizer = two_groups(*HIGHS)
    lows, up = [0.01, 1e-4], max(1, n // 3)
    sizes = {"cycle_first_step_size": up, "cycle_second_step_size": n}
    decay = {"decay_step_size": 7, "decay_lr_rate": 0.5}
    scheduler = deepspeed.OneCycle(optimizer, lows, list(HIGHS), cycle_momentum=False, **sizes, **decay)
    ours = [
        join(
            [
                Linear(start_lr=low, end_lr=high, total_steps=up),
                Linear(start_lr=high, end_lr=low, total_steps=n),
                Arc("inverse", high=low, low=0.0, span=7 / 0.5),
            ],
            [up, up + n],
        )
        for low, high in zip(lows, HIGHS, strict=True)
    ]
    check(ours, driven(optimizer, scheduler.step, 2 * n + 30))


@pytest.mark.parametrize("n", SIZES)
def test_range(deepspeed, n):
    lows, end = (1e-4, 1e-6), 3 * n
    settings = {"lr_range_test_step_size": n, "lr_range_test_step_rate": 2.0}
    optimizer = two_groups()
    scheduler = deepspeed.LRRangeTest(optimizer, list(lows), **settings)
    check(
        [Linear(start_lr=low, end_lr=7.0 * low, total_steps=end) for low in lows],
        driven(optimizer, scheduler.step, end + 1),
    )

    optimizer = two_groups()
    scheduler = deepspeed.LRRangeTest(optimizer, list(lows), lr_range_test_staircase=True, **settings)
    stairs = [Piecewise([(i * n, low * (1.0 + 2.0 * i)) for i in range(4)]) for low in lows]
    check(stairs, driven(optimizer, scheduler.step, end + 1))


def test_the_first_two_updates_have_the_rate_of_step_0(deepspeed):
    weight = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scheduler = deepspeed.WarmupLR(optimizer, 0.1, 0.5, warmup_num_steps=4, warmup_type="linear")
    assert [rates[0] for rates in driven(optimizer, scheduler.step, 4)] == pytest.approx([0.1, 0.1, 0.2, 0.3])
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scheduler = deepspeed.WarmupCosineLR(optimizer, 10, warmup_min_ratio=0.2, warmup_num_steps=4)
    assert [rates[0] for rates in driven(optimizer, scheduler.step, 2)] == pytest.approx([0.0, 0.1])


def test_a_warmup_is_of_two_steps_or_more(deepspeed):
    assert deepspeed.WarmupLR(two_groups(), warmup_num_steps=1).warmup_num_steps == 2
    with pytest.raises(ValueError, match="warmup_num_steps must be a positive integer"):
        deepspeed.WarmupLR(two_groups(), warmup_num_steps=0)
