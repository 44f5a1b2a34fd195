"""The formulas in Triton: the curves, the look-up of a segment, and the AdamW update of a block of elements.

They mirror `csrc/schedule.h`, `csrc/hyperparameters.h` and `csrc/adamw.h`, in the same order of operations.
Kernels that call them are to be launched with `enable_fp_fusion=False`: a fused multiply-add rounds otherwise.
"""
# mypy: ignore-errors
# What is decorated here is compiled by Triton, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from nexus.schedules.curves import Curve, Segment

_CONSTANT = tl.constexpr(float(Curve.CONSTANT))
_RISE = tl.constexpr(float(Curve.RISE))
_LINEAR = tl.constexpr(float(Curve.LINEAR))
_COSINE = tl.constexpr(float(Curve.COSINE))
_SQRT = tl.constexpr(float(Curve.SQRT))
_COLUMNS = tl.constexpr(len(Segment._fields))
_HALF_PI = tl.constexpr(1.57079632679489661923)


@triton.jit
def curve_weight(curve, p):
    """The weight of a segment at `p = position / length`, both float64 blocks; NaN where there is no such curve."""
    half = tl.cos(p * _HALF_PI)
    weight = tl.where(curve == _CONSTANT, 1.0, float("nan"))
    weight = tl.where(curve == _RISE, p, weight)
    weight = tl.where(curve == _LINEAR, 1.0 - p, weight)
    weight = tl.where(curve == _COSINE, half * half, weight)
    return tl.where(curve == _SQRT, 1.0 - tl.sqrt(p), weight)


@triton.jit
def evaluate_schedule(table, rows, t, mask):
    """The schedule's value at steps `t`, an int64 block; 0 where `mask` is not set.

    `table` points to `rows` rows of float64; both are scalars, or blocks of one schedule for each lane.
    """
    first = tl.zeros_like(t)
    last = first + tl.where(mask, rows, 1)  # the segment sought is in [first, last)
    while tl.max(last - first, axis=0) > 1:
        middle = first + (last - first) // 2
        start = tl.load(table + middle * _COLUMNS + 1, mask=mask, other=0.0).to(tl.int64)
        last = tl.where(start > t, middle, last)
        first = tl.where(start > t, first, middle)
    row = table + first * _COLUMNS
    start = tl.load(row + 1, mask=mask, other=0.0).to(tl.int64)
    length = tl.load(row + 2, mask=mask, other=1.0).to(tl.int64)
    p = ((t - start) % length).to(tl.float64) / length.to(tl.float64)
    high = tl.load(row + 3, mask=mask, other=0.0)
    low = tl.load(row + 4, mask=mask, other=0.0)
    return low + curve_weight(tl.load(row, mask=mask, other=0.0), p) * (high - low)


@triton.jit
def bias_correction(beta, t):
    """1 - beta**t in float64, for t >= 1 and 0 <= beta < 1."""
    return 1.0 - tl.exp(t * tl.log(beta))


@triton.jit
def _root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)  # tl.sqrt is approximate in float32
    else:
        return tl.sqrt(x)


@triton.jit
def _quotient(x, y):
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)  # x / y is approximate in float32
    else:
        return x / y


@triton.jit
def adamw(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, coefficients, AMSGRAD: tl.constexpr):
    """The new (param, exp_avg, exp_avg_sq, max_exp_avg_sq), all in the type of the arithmetic.

    `coefficients` is a tuple of that type, in the order of `nexus.backends.triton_tables.COEFFICIENTS`.

    Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; AMSGrad: Reddi et al. 2018, arXiv:1904.09237.
    """
    grad_multiplier, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps = coefficients
    g = grad_multiplier * grad
    m = exp_avg + one_minus_beta1 * (g - exp_avg)
    v = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    largest_v = v
    if AMSGRAD:
        # Written so that a NaN in either operand is kept, as torch.maximum keeps it.
        largest_v = tl.where((v > max_exp_avg_sq) | (v != v), v, max_exp_avg_sq)
    denominator = _root(largest_v) * inv_sqrt_bias2 + eps
    # Not (1 - decay) * param, a factor that is off the same way in every step. Infinity stays what it is.
    decayed = tl.where(param - param == 0.0, decay * param, 0.0)
    return param - (decayed + _quotient(step_size * m, denominator)), m, v, largest_v
