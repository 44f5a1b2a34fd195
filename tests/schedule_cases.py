"""What each curve is, and the schedules and steps at which evaluators are compared with the oracle."""

from __future__ import annotations

import math

import torch

from nexus.schedules import (
    MAX_STEP,
    WSD,
    WSDS,
    Constant,
    Cosine,
    CosineRestarts,
    Curve,
    Cyclic,
    Exponential,
    InverseSqrt,
    Linear,
    MultiStep,
    OneCycle,
    Piecewise,
    Polynomial,
    Sampled,
    Schedule,
    StepDecay,
    Tanh,
    evaluate,
)
from nexus.schedules.wsd import WSD_DECAYS

CURVES = {
    Curve.CONSTANT: lambda p, k, q: 1.0,
    Curve.RISE: lambda p, k, q: p,
    Curve.LINEAR: lambda p, k, q: 1.0 - p,
    Curve.COSINE: lambda p, k, q: ((1.0 + math.cos(math.pi * p**k)) / 2.0) ** q,
    Curve.SQRT: lambda p, k, q: 1.0 - math.sqrt(p),
    Curve.POWER: lambda p, k, q: (1.0 - p**k) ** q,
    Curve.EXPONENTIAL: lambda p, k, q: (q**p - k) / (1.0 - k),
    Curve.STAIRCASE: lambda p, k, q: q ** int(p),
    Curve.INVERSE: lambda p, k, q: (1.0 + p) ** -q,
    Curve.LOG: lambda p, k, q: k * math.log(p),
    Curve.TANH: lambda p, k, q: (1.0 - math.tanh(k * (1.0 - p) + q * p)) / 2.0,
}
"""The weight of each curve as its paper has it."""

WHOLE = [
    *(
        WSD(warmup_steps=100, stable_steps=300, decay_steps=200, peak_lr=1e-3, min_lr=1e-5, decay_type=decay)
        for decay in WSD_DECAYS
    ),
    WSD(warmup_steps=0, stable_steps=0, decay_steps=1000, peak_lr=1e-3),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=100, cycle_mult=1.0, warmup_steps=50),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=50, cycle_mult=1.1, warmup_steps=50),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=50, cycle_mult=2.0),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=1, cycle_mult=3.0),
    Cosine(peak_lr=1e-3, total_steps=900, min_lr=1e-5, warmup_steps=100),
    Cosine(peak_lr=1e-3, total_steps=900, min_lr=1e-5, warmup_steps=100, warmup_start_lr=3e-4),
    Constant(0.1),
]

FAMILIES = [
    Linear(start_lr=1e-5, end_lr=1e-3, total_steps=113),
    Linear(start_lr=1e-3, end_lr=1e-5, total_steps=113),
    Polynomial(peak_lr=1e-3, total_steps=113, power=1.7, min_lr=1e-5),
    Exponential(peak_lr=1e-3, gamma=0.9, every=7, min_lr=1e-5),
    StepDecay(peak_lr=1e-3, gamma=0.9, every=7, min_lr=1e-5),
    MultiStep(peak_lr=1e-3, milestones=[10, 20, 20, 113], gamma=0.1),
    InverseSqrt(peak_lr=1e-3, timescale=13),
    Tanh(peak_lr=1e-3, total_steps=113, min_lr=1e-5),
    WSDS(warmup_steps=13, cycle_length=50, decay_steps=20, peak_lr=1e-3, min_lr=1e-5, decay_type="cosine"),
    WSDS(
        warmup_steps=13,
        cycle_length=50,
        decay_steps=20,
        peak_lr=1e-3,
        min_lr=1e-5,
        decay_type="exponential",
        cycles=3,
    ),
    OneCycle(peak_lr=1e-3, total_steps=113),
    OneCycle(peak_lr=1e-3, total_steps=113, up_fraction=0.25, kind="linear", three_phase=True),
    Cyclic(base_lr=1e-5, peak_lr=1e-3, up_steps=20, down_steps=30),
    Cyclic(base_lr=1e-5, peak_lr=1e-3, up_steps=20, mode="triangular2"),
    Cyclic(base_lr=1e-5, peak_lr=1e-3, up_steps=20, down_steps=30, mode="exp_range", gamma=0.99),
    *(Piecewise([(0, 0.0), (13, 1e-3), (113, 1e-5)], kind=kind) for kind in ("constant", "linear", "cosine")),
    Sampled([1e-3, 3e-4, 0.0, 1e-4], every=13),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-5, cycle_length=50, cycle_mult=1.0, warmup_steps=13, cycle_decay=0.7),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-5, cycle_length=3, cycle_mult=1.1, warmup_steps=13, cycle_decay=0.7),
    CosineRestarts(
        peak_lr=1e-3, min_lr=1e-5, cycle_length=50, warmup_steps=13, cycle_decay=0.7, warmup_start_lr=3e-4
    ),
]
"""One or more of each family, but those of `WHOLE`."""


def boundaries(schedule: Schedule) -> list[int]:
    """The first and last steps of every phase and cycle, their neighbours, and where narrow types overflow."""
    edges = {0, 2**24, 2**31, 2**32, MAX_STEP}
    for layer in schedule.layers():
        edges |= {layer.repeat_start + i * layer.repeat_length for i in range(3)}
        for row in layer.segments[:80]:
            edges |= {row.start, row.start + row.period // 2, row.start + row.period, row.start + int(row.span)}
    near = {edge + offset for edge in edges for offset in (-2, -1, 0, 1, 2)}
    return sorted(step for step in near if 0 <= step <= MAX_STEP)


def assert_equal_to_oracle(schedule: Schedule, steps: list[int]) -> None:
    oracle = torch.tensor([schedule(step) for step in steps], dtype=torch.float64)
    at = torch.tensor(steps, dtype=torch.int64)
    for exact in ("native", "cuda on cpu"):
        assert torch.equal(evaluate(schedule, at, backend=exact), oracle)  # in float64, no difference at all
    assert_within_rounding(evaluate(schedule, at, backend="reference"), oracle)


def assert_within_rounding(values: torch.Tensor, oracle: torch.Tensor) -> None:
    """Its cosine and square root may be another library's, each within a unit in the last place."""
    top = float(oracle.max())
    assert ((values - oracle).abs() <= oracle * 2**-50 + top * 2**-52).all()
    far = oracle >= 1e-6 * top  # where 1 - sqrt(p) is not a difference of nearly equal numbers
    assert torch.equal(values.float()[far], oracle.float()[far])
