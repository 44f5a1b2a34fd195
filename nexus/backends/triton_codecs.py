"""The codecs in Triton: how a stream is stored is said here, and nowhere else in Triton.

They mirror `csrc/codec.h` and `csrc/chance.h`, to the bit. `place` says which block of a chunk it is: its first
element, all its elements, and the chunk's count; of a block that is not ALIGNED, those from `count` on are not the
tensor's.
"""
# mypy: ignore-errors
# What is decorated here is compiled by Triton, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from nexus.backends.codecs import SCALE_BLOCK

_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_INFINITY = tl.constexpr(0x7F800000)
_NAN = tl.constexpr(0x7FC00000)
_INV_127 = tl.constexpr(1 / 127)
_INV_255 = tl.constexpr(1 / 255)


@triton.jit
def stream_at(address, begin, dtype: tl.constexpr):
    """A stream from its element `begin` on."""
    return (address + begin * (dtype.primitive_bitwidth // 8)).to(tl.pointer_type(dtype))


@triton.jit
def load(stream, i, count, T: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements `i` of a stream as T; those from `count` on are 0, which ALIGNED blocks have none of."""
    if ALIGNED:  # in accesses of 128 bits
        return tl.load(tl.multiple_of(stream + i, 16)).to(T)
    else:
        return tl.load(stream + i, mask=i < count, other=0.0).to(T)


@triton.jit
def store(stream, i, count, elements, ALIGNED: tl.constexpr):
    """Elements `i` of a stream, rounded to nearest."""
    stored = elements.to(stream.dtype.element_ty)
    if ALIGNED:
        tl.store(tl.multiple_of(stream + i, 16), stored)
    else:
        tl.store(stream + i, stored, mask=i < count)


# Chance: (seed, the tensor's ordinal, its count of updates with this one, the chunk's first element in the whole
# tensor).


@triton.jit
def _draw(chance, eighths):
    """Four words for each eight elements of the whole tensor: Philox4x32-7."""
    seed, ordinal, step, _ = chance
    return tl.philox(seed, eighths.to(tl.uint32), ordinal, (eighths >> 32).to(tl.uint32), step, n_rounds=7)


@triton.jit
def random_words(chance, place):
    """Of a block: one word for two elements."""
    _, _, _, first = chance
    offset, i, _ = place
    BLOCK: tl.constexpr = i.shape[0]
    eighths = first // 8 + (offset // 8 + tl.arange(0, BLOCK // 8))
    a, b, c, d = _draw(chance, eighths)
    before = first % 8  # of the numbers of a draw, for elements of another shard: they make room for the next draw's
    if before != 0:
        e, f, g, h = _draw(chance, eighths + 1)
        if before & 4 != 0:
            a, b, c, d, e, f = c, d, e, f, g, h
        if before & 2 != 0:
            a, b, c, d, e = b, c, d, e, f
        if before & 1 != 0:
            a = (a >> 16) | (b << 16)
            b = (b >> 16) | (c << 16)
            c = (c >> 16) | (d << 16)
            d = (d >> 16) | (e << 16)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK // 2,))


@triton.jit
def _numbers(words):
    """The random numbers of the elements' moments, of 16 bits each: halves of the words, the lower one first."""
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (2 * words.shape[0],))


@triton.jit
def _swapped(words):
    """Those of the parameters: the same bytes in the other order."""
    return _numbers(((words >> 8) & 0xFF00FF) | ((words << 8) & 0xFF00FF00))


@triton.jit
def _upper_half(bits):
    """The bfloat16 with these bits."""
    return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _bfloat16_by_chance(value, numbers):
    bits = value.to(tl.uint32, bitcast=True)
    return _upper_half(tl.where(value == value, (bits + numbers) >> 16, 0x7FC0))


# The parameter, with or without the low bits of a master weight.


@triton.jit
def load_param(params, lows, place, T: tl.constexpr, HAS_MASTER: tl.constexpr, ALIGNED: tl.constexpr):
    """As T: the master weight if there is one."""
    _, i, count = place
    if HAS_MASTER:
        WIDTH: tl.constexpr = lows.dtype.element_ty.primitive_bitwidth
        upper = load(params, i, count, tl.bfloat16, ALIGNED).to(tl.uint16, bitcast=True).to(tl.uint32)
        lower = load(lows, i, count, tl.uint32, ALIGNED) & ((1 << WIDTH) - 1)
        # Beside a zero that somebody has written over the parameter, such bits would make a NaN.
        is_stale = ((upper & 0x7FFF) == 0) & ((lower >> (WIDTH - 1)) != 0)
        lower = tl.where(is_stale, 0, lower)
        kept = ((upper - (lower >> (WIDTH - 1))) << WIDTH) | lower
        return (kept << (16 - WIDTH)).to(tl.float32, bitcast=True)
    else:
        return load(params, i, count, T, ALIGNED)


@triton.jit
def store_param(
    params, lows, place, param, words, HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr
):
    """Of a master weight, the parameter is the bfloat16 half, rounded with ties away from zero."""
    _, i, count = place
    if HAS_MASTER:
        WIDTH: tl.constexpr = lows.dtype.element_ty.primitive_bitwidth
        kept = param.to(tl.uint32, bitcast=True)
        if WIDTH == 8:
            added = _swapped(words) >> 8 if STOCHASTIC else 0x80
            kept = (kept + added) >> 8
        lower = kept & ((1 << WIDTH) - 1)
        upper = (kept >> WIDTH) + (lower >> (WIDTH - 1))
        is_number = param == param
        store(params, i, count, _upper_half(tl.where(is_number, upper, 0x7FC0)), ALIGNED)
        store(lows, i, count, tl.where(is_number, lower, 0), ALIGNED)
    elif STOCHASTIC and params.dtype.element_ty == tl.bfloat16:
        store(params, i, count, _bfloat16_by_chance(param, _swapped(words)), ALIGNED)
    else:
        store(params, i, count, param, ALIGNED)


# Moments. In 8 bits, the first is int8, the others uint8, and each 128 elements have a scale.


@triton.jit
def _rows(offset, BLOCK: tl.constexpr):
    """The places of a block's scales."""
    return offset // _SCALE_BLOCK + tl.arange(0, BLOCK // _SCALE_BLOCK)


@triton.jit
def _spread(scale, BLOCK: tl.constexpr):
    """For each element, the scale's number that is its own."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK // _SCALE_BLOCK, _SCALE_BLOCK)), (BLOCK,))


@triton.jit
def load_moment(moment, place, T: tl.constexpr, ALIGNED: tl.constexpr):
    """As T. `moment` is the stream, and the one of its scales, which is read if it has any."""
    codes, scales = moment
    offset, i, count = place
    stored = load(codes, i, count, T, ALIGNED)
    if codes.dtype.element_ty.primitive_bitwidth == 8:
        BLOCK: tl.constexpr = i.shape[0]
        rows = _rows(offset, BLOCK)
        scale = _spread(tl.load(scales + rows, mask=rows * _SCALE_BLOCK < count, other=0.0), BLOCK)
        if codes.dtype.element_ty == tl.int8:
            root = stored * _INV_127
            stored = root * tl.abs(root) * scale
        else:
            fourth_root = stored * _INV_255
            root = fourth_root * fourth_root * scale
            stored = root * root
    return stored


@triton.jit
def store_moment(moment, place, value, words, BY_CHANCE: tl.constexpr, ALIGNED: tl.constexpr):
    """Round to what the stream holds: in bfloat16 to nearest, or by chance; in 8 bits by chance."""
    codes, _ = moment
    _, i, count = place
    if codes.dtype.element_ty.primitive_bitwidth == 8:
        _store_scaled(moment, place, value, words, ALIGNED)
    elif BY_CHANCE and codes.dtype.element_ty == tl.bfloat16:
        store(codes, i, count, _bfloat16_by_chance(value, _numbers(words)), ALIGNED)
    else:
        store(codes, i, count, value, ALIGNED)


@triton.jit
def _store_scaled(moment, place, value, words, ALIGNED: tl.constexpr):
    codes, scales = moment
    offset, i, count = place
    BLOCK: tl.constexpr = i.shape[0]
    SIGNED: tl.constexpr = codes.dtype.element_ty == tl.int8
    MOST: tl.constexpr = 127 if SIGNED else 255
    SMALLEST_SCALE: tl.constexpr = 0x10800000 if SIGNED else 0x28000000  # the bits of 2**-94, and of 2**-47
    magnitude = tl.abs(value if SIGNED else tl.sqrt_rn(value))  # the root is that of the update
    bits = magnitude.to(tl.int32, bitcast=True)
    if not ALIGNED:
        bits = tl.where(i < count, bits, 0)
    largest = tl.max(tl.reshape(bits, (BLOCK // _SCALE_BLOCK, _SCALE_BLOCK)), axis=1)
    largest = tl.maximum(largest, SMALLEST_SCALE)
    scale = tl.where(largest > _INFINITY, _NAN, largest).to(tl.float32, bitcast=True)
    rows = _rows(offset, BLOCK)
    tl.store(scales + rows, scale, mask=rows * _SCALE_BLOCK < count)
    # What the scale times is as many steps as there are codes, at least, squared.
    squared = (tl.div_rn(MOST * MOST * 1.0, scale).to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)
    # 128 + number / 65536 is a float, of which the number is the lower half.
    chance = (_numbers(words) | 0x43000000).to(tl.float32, bitcast=True)
    steps = tl.sqrt_rn(magnitude * _spread(squared, BLOCK)) + chance
    code = tl.where(steps < 128.0 + MOST, steps, 128.0 + MOST).to(tl.int32) - 128  # all of them where it is NaN
    code = tl.where(value < 0.0, -code, code) if SIGNED else tl.maximum(code, 2)
    store(codes, i, count, code, ALIGNED)
