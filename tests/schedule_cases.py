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
    *(WSD(100, 300, 200, 1e-3, 1e-5, decay) for decay in WSD_DECAYS),
    WSD(0, 0, 1000, 1e-3),
    CosineRestarts(1e-3, 1e-6, 100, 1.0, 50),
    CosineRestarts(1e-3, 1e-6, 50, 1.1, 50),
    CosineRestarts(1e-3, 1e-6, 50, 2.0),
    CosineRestarts(1e-3, 1e-6, 1, 3.0),
    Cosine(1e-3, 900, 1e-5, 100),
    Constant(0.1),
]

FAMILIES = [
    Linear(1e-5, 1e-3, 113),
    Linear(1e-3, 1e-5, 113),
    Polynomial(1e-3, 113, 1.7, 1e-5),
    Exponential(1e-3, 0.9, 7, 1e-5),
    StepDecay(1e-3, 0.9, 7, 1e-5),
    MultiStep(1e-3, [10, 20, 20, 113], 0.1),
    InverseSqrt(1e-3, 13),
    Tanh(1e-3, 113, 1e-5),
    WSDS(13, 50, 20, 1e-3, 1e-5, "cosine"),
    WSDS(13, 50, 20, 1e-3, 1e-5, "exponential", 3),
    OneCycle(1e-3, 113),
    OneCycle(1e-3, 113, 0.25, kind="linear", three_phase=True),
    Cyclic(1e-5, 1e-3, 20, 30),
    Cyclic(1e-5, 1e-3, 20, mode="triangular2"),
    Cyclic(1e-5, 1e-3, 20, 30, "exp_range", 0.99),
    *(Piecewise([(0, 0.0), (13, 1e-3), (113, 1e-5)], kind) for kind in ("constant", "linear", "cosine")),
    Sampled([1e-3, 3e-4, 0.0, 1e-4], 13),
    CosineRestarts(1e-3, 1e-5, 50, 1.0, 13, 0.7),
    CosineRestarts(1e-3, 1e-5, 3, 1.1, 13, 0.7),
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
