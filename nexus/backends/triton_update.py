"""The kernel that updates tensors: decode each stream, `adamw`, encode."""
# mypy: ignore-errors
# What is decorated here is compiled by Triton, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from nexus.backends.codecs import SCALE_BLOCK
from nexus.backends.triton_codecs import (
    load,
    load_moment,
    load_param,
    random_words,
    store_moment,
    store_param,
    stream_at,
)
from nexus.backends.triton_math import adamw, averaged
from nexus.backends.triton_words import (
    CHUNK_WORDS,
    COEFFICIENT_WORDS,
    DTYPES,
    GRAD_WORD,
    GROUP_AND_KIND_WORD,
    RECORD_WORDS,
    STEP_WORD,
    word,
)

_PARAM = word("TensorRecord", "param")
_EXP_AVG = word("TensorRecord", "exp_avg")
_EXP_AVG_SQ = word("TensorRecord", "exp_avg_sq")
_MAX_EXP_AVG_SQ = word("TensorRecord", "max_exp_avg_sq")
_AVERAGE = word("TensorRecord", "average")
_MASTER_LOW = word("TensorRecord", "master_low")
_EXP_AVG_SCALE = word("TensorRecord", "exp_avg_scale")
_EXP_AVG_SQ_SCALE = word("TensorRecord", "exp_avg_sq_scale")
_MAX_EXP_AVG_SQ_SCALE = word("TensorRecord", "max_exp_avg_sq_scale")
_FIRST = word("TensorRecord", "first")
_ORDINAL = word("TensorRecord", "ordinal")
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)


@triton.constexpr_function
def _bits(moment):
    """Of an element, as it is stored."""
    return moment[0].dtype.element_ty.primitive_bitwidth


@triton.jit
def _update_block(
    streams,
    place,
    coefficients,
    chance,
    T: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    AVERAGED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    params, lows, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, averages = streams
    _, i, count = place
    param = load_param(params, lows, place, T, HAS_MASTER, ALIGNED)
    grad = load(grads, i, count, T, ALIGNED)
    exp_avg = load_moment(exp_avgs, place, T, ALIGNED)
    exp_avg_sq = load_moment(exp_avg_sqs, place, T, ALIGNED)
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = load_moment(max_exp_avg_sqs, place, T, ALIGNED)
    average = param
    if AVERAGED:
        average = load_moment(averages, place, T, ALIGNED)
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = adamw(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, coefficients, AMSGRAD
    )
    words = 0
    if STOCHASTIC or _bits(exp_avgs) == 8 or _bits(exp_avg_sqs) < 32 or (AVERAGED and _bits(averages) < 32):
        words = random_words(chance, place)
    store_param(params, lows, place, param, words, HAS_MASTER, STOCHASTIC, ALIGNED)
    # To nearest, a second moment would freeze: what a step adds is less than half a unit.
    store_moment(exp_avg_sqs, place, exp_avg_sq, words, True, ALIGNED)
    store_moment(exp_avgs, place, exp_avg, words, STOCHASTIC, ALIGNED)
    if AMSGRAD:
        store_moment(max_exp_avg_sqs, place, max_exp_avg_sq, words, True, ALIGNED)
    if AVERAGED:
        store_moment(averages, place, averaged(average, param, coefficients), words, True, ALIGNED)


@triton.jit
def _moment(address, scales, begin, dtype: tl.constexpr):
    """A moment from its element `begin` on, and its scales, whose address `scales` points to."""
    return stream_at(address, begin, dtype), stream_at(tl.load(scales), begin // _SCALE_BLOCK, tl.float32)


@triton.jit
def _update_chunk(
    record,
    begin,
    count,
    row,
    seed,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    MASTER_LOW: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    AVERAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = PARAM if tl.float64 == PARAM else tl.float32
    HAS_MASTER: tl.constexpr = MASTER_LOW >= 0
    AVERAGED: tl.constexpr = AVERAGE >= 0
    param_address = tl.load(record + _PARAM)
    low_address = tl.load(record + _MASTER_LOW)
    grad_address = tl.load(record + GRAD_WORD)
    exp_avg_address = tl.load(record + _EXP_AVG)
    exp_avg_sq_address = tl.load(record + _EXP_AVG_SQ)
    max_address = tl.load(record + _MAX_EXP_AVG_SQ)
    average_address = tl.load(record + _AVERAGE)
    streams = (
        stream_at(param_address, begin, PARAM),
        stream_at(low_address, begin, DTYPES[MASTER_LOW]),
        stream_at(grad_address, begin, GRAD),
        _moment(exp_avg_address, record + _EXP_AVG_SCALE, begin, EXP_AVG),
        _moment(exp_avg_sq_address, record + _EXP_AVG_SQ_SCALE, begin, EXP_AVG_SQ),
        _moment(max_address, record + _MAX_EXP_AVG_SQ_SCALE, begin, EXP_AVG_SQ),
        _moment(average_address, record + _EXP_AVG_SCALE, begin, DTYPES[AVERAGE]),  # it has no scales
    )
    # Chunks begin at multiples of 16 elements: a stream is aligned where its tensor is.
    addresses = param_address | grad_address | exp_avg_address | exp_avg_sq_address | max_address | average_address
    if HAS_MASTER:
        addresses |= low_address
    full = tl.where(addresses % 16 == 0, count // BLOCK * BLOCK, 0)
    coefficients = (
        tl.load(row).to(T),
        tl.load(row + 1).to(T),
        tl.load(row + 2).to(T),
        tl.load(row + 3).to(T),
        tl.load(row + 4).to(T),
        tl.load(row + 5).to(T),
        tl.load(row + 6).to(T),
        tl.load(row + 7).to(T),
        tl.load(row + 8).to(T),
    )
    ordinal = tl.load(record + _ORDINAL).to(tl.uint32)
    chance = (seed, ordinal, tl.load(row + 9).to(tl.int64).to(tl.uint32), tl.load(record + _FIRST) + begin)
    offsets = tl.arange(0, BLOCK)
    offset = tl.zeros_like(count)
    while offset < full:
        _update_block(
            streams,
            (offset, offset + offsets, count),
            coefficients,
            chance,
            T,
            HAS_MASTER,
            AMSGRAD,
            STOCHASTIC,
            AVERAGED,
            True,
        )
        offset += BLOCK
    while offset < count:
        _update_block(
            streams,
            (offset, offset + offsets, count),
            coefficients,
            chance,
            T,
            HAS_MASTER,
            AMSGRAD,
            STOCHASTIC,
            AVERAGED,
            False,
        )
        offset += BLOCK


@triton.jit(
    do_not_specialize=[
        "chunks",
        "records",
        "coefficients",
        "skip",
        "completed",
        "skipped",
        "advances",
        "history_count",
        "seed",
    ]
)
def update(
    chunks,
    records,
    coefficients,
    skip,
    completed,
    skipped,
    advances: tl.int64,
    history_count: tl.int64,
    seed: tl.int64,
    KINDS: tl.constexpr,
):
    """Update one chunk of a tensor and, in its first, the tensor's counter. A program for each chunk of the model.

    `KINDS` has each `Kind` that occurs in the model, in the order of the records' `kind`.
    """
    index = tl.program_id(0).to(tl.int64)
    skips = tl.load(skip) != 0
    if (index == 0) & (advances != 0):
        counter = completed
        if skips:
            counter = skipped
        tl.store(counter, tl.load(counter) + 1)
        if history_count != 0:
            rows_written = history_count.to(tl.int64).to(tl.pointer_type(tl.int64))
            tl.store(rows_written, tl.load(rows_written) + 1)
    if skips == 0:
        chunk = chunks + index * CHUNK_WORDS
        begin = tl.load(chunk)
        count = tl.load(chunk + 1).to(tl.int32)  # at most CHUNK_ELEMENTS
        tensor = tl.load(chunk + 2)
        record = records + tensor * RECORD_WORDS
        if tl.load(record + GRAD_WORD) != 0:
            if begin == 0:
                step = tl.load(record + STEP_WORD).to(tl.pointer_type(tl.float64))
                tl.store(step, tl.load(step) + 1)
            kind = tl.load(record + GROUP_AND_KIND_WORD) >> 32
            row = coefficients + tensor * COEFFICIENT_WORDS
            for j in tl.static_range(len(KINDS)):
                if kind == j:
                    _update_chunk(
                        record,
                        begin,
                        count,
                        row,
                        seed,
                        DTYPES[KINDS[j][0]],
                        DTYPES[KINDS[j][1]],
                        DTYPES[KINDS[j][2]],
                        DTYPES[KINDS[j][3]],
                        KINDS[j][4],
                        KINDS[j][5],
                        KINDS[j][6],
                        KINDS[j][7],
                        KINDS[j][8],
                    )
