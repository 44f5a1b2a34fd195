"""The formulas in Triton: the curves, the look-up of a segment, and the AdamW update of a block of elements.

They mirror `csrc/schedule.h`, `csrc/hyperparameters.h` and `csrc/adamw.h`, in the same order of operations.
Kernels that call them are to be launched with `enable_fp_fusion=False`: a fused multiply-add rounds otherwise.
"""
# mypy: ignore-errors
# What is decorated here is compiled by Triton, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from nexus.schedules.curves import LARGEST, Curve, Op, Segment

_CONSTANT = tl.constexpr(float(Curve.CONSTANT))
_RISE = tl.constexpr(float(Curve.RISE))
_LINEAR = tl.constexpr(float(Curve.LINEAR))
_COSINE = tl.constexpr(float(Curve.COSINE))
_SQRT = tl.constexpr(float(Curve.SQRT))
_POWER = tl.constexpr(float(Curve.POWER))
_EXPONENTIAL = tl.constexpr(float(Curve.EXPONENTIAL))
_STAIRCASE = tl.constexpr(float(Curve.STAIRCASE))
_INVERSE = tl.constexpr(float(Curve.INVERSE))
_LOG = tl.constexpr(float(Curve.LOG))
_TANH = tl.constexpr(float(Curve.TANH))
_SAMPLED = tl.constexpr(float(Curve.SAMPLED))
_TIMES = tl.constexpr(float(Op.TIMES))
_PLUS = tl.constexpr(float(Op.PLUS))
_MIN = tl.constexpr(float(Op.MIN))
_MAX = tl.constexpr(float(Op.MAX))
_COLUMNS = tl.constexpr(len(Segment._fields))
_LARGEST = tl.constexpr(LARGEST)
_HALF_PI = tl.constexpr(1.57079632679489661923)


@triton.jit
def _power(x, k):
    """x**k, without a logarithm where other operations give it."""
    result = tl.where(k == 0.5, tl.sqrt(x), tl.exp(k * tl.log(x)))
    result = tl.where(k == 2.0, x * x, result)
    return tl.where(k == 1.0, x, result)


@triton.jit
def _sampled(samples, count, p, mask):
    """The value at place p of `count` samples, the last of which stays."""
    place = tl.minimum(tl.maximum(tl.floor(p), 0.0), count - 1.0)
    i = place.to(tl.int64)
    value = tl.load(samples + i, mask=mask, other=0.0)
    following = tl.load(samples + i + 1, mask=mask & (place < count - 1.0), other=0.0)
    rest = p - place
    is_between = (rest > 0.0) & (rest < 1.0) & (place < count - 1.0)
    return tl.where(is_between, value + rest * (following - value), value)


@triton.jit
def _curve_weight(curve, p, k, q):
    """The weight of a segment at its place p, all float64 blocks; NaN of SAMPLED and of no curve."""
    weight = tl.where(curve == _CONSTANT, 1.0, float("nan"))
    weight = tl.where(curve == _RISE, p, weight)
    weight = tl.where(curve == _LINEAR, 1.0 - p, weight)
    powered = _power(p, k)
    half = tl.cos(powered * _HALF_PI)
    weight = tl.where(curve == _COSINE, _power(half * half, q), weight)
    weight = tl.where(curve == _SQRT, 1.0 - tl.sqrt(p), weight)
    weight = tl.where(curve == _POWER, _power(1.0 - powered, q), weight)
    weight = tl.where(curve == _EXPONENTIAL, (_power(q, p) - k) / (1.0 - k), weight)
    weight = tl.where(curve == _STAIRCASE, _power(q, tl.floor(p)), weight)
    weight = tl.where(curve == _INVERSE, 1.0 / _power(1.0 + p, q), weight)
    weight = tl.where(curve == _LOG, k * tl.log(p), weight)
    # (1 - tanh x) / 2
    return tl.where(curve == _TANH, 1.0 / (1.0 + tl.exp(2.0 * (k * (1.0 - p) + q * p))), weight)


@triton.jit
def _bounded(rate):
    """The rate, or the largest number that there is: infinity times 0 would be NaN."""
    return tl.where(rate > _LARGEST, _LARGEST, rate)


@triton.jit
def _layer_value(layer, t, mask):
    """The values of layers, to whose first rows the block `layer` points."""
    repeat_start = tl.load(layer + 2, mask=mask, other=0.0).to(tl.int64)
    repeat_length = tl.load(layer + 3, mask=mask, other=1.0).to(tl.int64)
    t = tl.where(t >= repeat_start, repeat_start + (t - repeat_start) % repeat_length, t)
    segments = layer + _COLUMNS
    first = tl.zeros_like(t)
    last = tl.load(layer + 1, mask=mask, other=1.0).to(tl.int64)  # the segment sought is in [first, last)
    while tl.max(last - first, axis=0) > 1:
        middle = first + (last - first) // 2
        start = tl.load(segments + middle * _COLUMNS + 1, mask=mask, other=0.0).to(tl.int64)
        last = tl.where(start > t, middle, last)
        first = tl.where(start > t, first, middle)
    row = segments + first * _COLUMNS
    curve = tl.load(row, mask=mask, other=0.0)
    start = tl.load(row + 1, mask=mask, other=0.0).to(tl.int64)
    period = tl.load(row + 2, mask=mask, other=1.0).to(tl.int64)
    offset = tl.load(row + 3, mask=mask, other=0.0)
    span = tl.load(row + 4, mask=mask, other=1.0)
    high = tl.load(row + 5, mask=mask, other=0.0)
    low = tl.load(row + 6, mask=mask, other=0.0)
    k = tl.load(row + 7, mask=mask, other=1.0)
    q = tl.load(row + 8, mask=mask, other=1.0)
    p = (((t - start) % period).to(tl.float64) + offset) / span
    is_sampled = mask & (curve == _SAMPLED)
    sampled = _sampled(layer + tl.where(is_sampled, k, 0.0).to(tl.int64), q, p, is_sampled)
    weight = tl.where(is_sampled, sampled, _curve_weight(curve, p, k, q))
    return _bounded(low + weight * (high - low))


@triton.jit
def _folded(op, before, value):
    folded = tl.where(op == _TIMES, _bounded(before * value), value)
    folded = tl.where(op == _PLUS, _bounded(before + value), folded)
    folded = tl.where((op == _MIN) & (value >= before), before, folded)
    return tl.where((op == _MAX) & (value <= before), before, folded)


@triton.jit
def evaluate_schedule(table, layers, rows, t, mask):
    """The schedule's value at steps `t`, an int64 block; 0 where `mask` is not set.

    `table` points to `layers` layers of `rows` rows of float64; they are scalars, or blocks of one schedule for each
    lane.
    """
    value = tl.zeros_like(t).to(tl.float64)
    layers = tl.where(mask, layers, 0)
    most = tl.max(layers, axis=0)
    i = tl.zeros_like(most)
    while i < most:
        is_there = i < layers
        layer = table + (tl.zeros_like(t) + i * rows * _COLUMNS)
        op = tl.load(layer, mask=is_there, other=0.0)
        value = tl.where(is_there, _folded(op, value, _layer_value(layer, t, is_there)), value)
        i += 1
    return value


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
    grad_multiplier, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inv_sqrt_bias2, eps, _ = coefficients
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


@triton.jit
def averaged(average, param, coefficients):
    """The average of a parameter's values, once there is another. A weight of 1 copies, to the bit."""
    _, _, _, _, _, _, _, _, weight = coefficients
    return tl.where(weight == 1.0, param, average + weight * (param - average))
