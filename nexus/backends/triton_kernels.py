"""The kernels of the Triton backend. A step is `norm`, `norm_total` (where a norm is wanted), `prologue`, `update`.

They find everything through the tables of `nexus.backends.triton_tables`. Where a chunk begins is an int64, since
a tensor may have more than 2**31 elements; within a chunk, an int32 will do, and takes fewer registers.
"""
# mypy: ignore-errors
# What is decorated here is compiled by Triton, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from nexus.backends.codecs import SCALE_BLOCK
from nexus.backends.interface import HISTORY_COLUMNS
from nexus.backends.records import DTYPES, layout
from nexus.backends.triton_codecs import (
    ROUNDED_EXP_AVG,
    ROUNDED_EXP_AVG_SQ,
    ROUNDED_MAX_EXP_AVG_SQ,
    load,
    load_moment,
    load_param,
    store_moment,
    store_param,
    stream_at,
)
from nexus.backends.triton_math import adamw, bias_correction, evaluate_schedule
from nexus.backends.triton_tables import CHUNK, COEFFICIENTS


def _word(record, field):
    """Where a field stands, in words."""
    return tl.constexpr(layout(record).offset(field) // 8)


_RECORD_WORDS = tl.constexpr(layout("TensorRecord").words)
_PARAM = _word("TensorRecord", "param")
_GRAD = _word("TensorRecord", "grad")
_EXP_AVG = _word("TensorRecord", "exp_avg")
_EXP_AVG_SQ = _word("TensorRecord", "exp_avg_sq")
_MAX_EXP_AVG_SQ = _word("TensorRecord", "max_exp_avg_sq")
_MASTER_LOW = _word("TensorRecord", "master_low")
_EXP_AVG_SCALE = _word("TensorRecord", "exp_avg_scale")
_EXP_AVG_SQ_SCALE = _word("TensorRecord", "exp_avg_sq_scale")
_MAX_EXP_AVG_SQ_SCALE = _word("TensorRecord", "max_exp_avg_sq_scale")
_STEP = _word("TensorRecord", "step")
_FIRST = _word("TensorRecord", "first")
_ORDINAL = _word("TensorRecord", "ordinal")
_GROUP_AND_KIND = _word("TensorRecord", "group")  # an int32 each, the kind as the place
_GROUP_WORDS = tl.constexpr(layout("Group").words)
_WEIGHT_DECAY = _word("Group", "weight_decay.value")
_BETA1 = _word("Group", "beta1")
_BETA2 = _word("Group", "beta2")
_EPS = _word("Group", "eps")
_MAX_GRAD_NORM = _word("Group", "max_grad_norm")
_MAXIMIZE = _word("Group", "maximize")
_VALUE = _word("Rate", "value")
_TENSOR = _word("Rate", "tensor")
_IS_FLOAT64 = _word("Rate", "is_float64")
_TABLE = _word("Rate", "table")
_ROWS = _word("Rate", "rows")
_SCALE = _word("Rate", "scale")
_LAST = _word("Rate", "last")
_CHUNK_WORDS = tl.constexpr(len(CHUNK))
_COEFFICIENTS = tl.constexpr(len(COEFFICIENTS))
_HISTORY_COLUMNS = tl.constexpr(HISTORY_COLUMNS)
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_DTYPES = tl.constexpr(tuple(getattr(tl, str(dtype).removeprefix("torch.")) for dtype in DTYPES))


@triton.jit
def _float64(words, mask):
    return tl.load(words, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _rates(words, t, mask):
    """The rates at step t of a block of groups; `words` points to each one's record `Rate`."""
    tensor = tl.load(words + _TENSOR, mask=mask, other=0)
    is_float64 = tl.load(words + _IS_FLOAT64, mask=mask, other=0) != 0
    segments = tl.load(words + _TABLE, mask=mask, other=0)
    rows = tl.load(words + _ROWS, mask=mask, other=0)
    given = tensor != 0
    narrow = tl.load(tensor.to(tl.pointer_type(tl.float32)), mask=given & (is_float64 == 0), other=0.0)
    wide = tl.load(tensor.to(tl.pointer_type(tl.float64)), mask=given & is_float64, other=0.0)
    rate = tl.where(given, tl.where(is_float64, wide, narrow.to(tl.float64)), _float64(words + _VALUE, mask))
    scheduled = segments != 0
    steps = tl.zeros_like(rows) + t
    curve = evaluate_schedule(segments.to(tl.pointer_type(tl.float64)), rows, steps, scheduled)
    return tl.where(scheduled, _float64(words + _SCALE, mask) * curve, rate)


@triton.jit
def _leave(words, rate, mask):
    """Store scheduled rates where their readers look."""
    last = tl.load(words + _LAST, mask=mask, other=0)
    tl.store(last.to(tl.pointer_type(tl.float64)), rate, mask=last != 0)


@triton.jit
def _clip(limit, grad_norm):
    # As torch.nn.utils.clip_grad_norm_, so that a NaN norm stays NaN; an infinite limit does not clip.
    clip = limit / (grad_norm + 1e-6)
    return tl.where((clip > 1.0) | (limit - limit != 0.0), 1.0, clip)


@triton.jit
def _history_row(count, rows, slots, width):
    """The row of the step that is under way, which `update` completes by advancing the count."""
    written = tl.load(count.to(tl.int64).to(tl.pointer_type(tl.int64)))
    return rows.to(tl.int64).to(tl.pointer_type(tl.float64)) + written % slots * width


@triton.jit
def _sum_chunk(address, begin, count, out, dtype: tl.constexpr, BLOCK: tl.constexpr):
    grad = stream_at(address, begin, dtype)
    full = tl.where(address % 16 == 0, count // BLOCK * BLOCK, 0)
    total = tl.zeros((BLOCK,), tl.float64)
    offsets = tl.arange(0, BLOCK)
    offset = tl.zeros_like(count)
    while offset < full:
        g = load(grad, offset + offsets, count, tl.float64, True)
        total += g * g
        offset += BLOCK
    while offset < count:
        g = load(grad, offset + offsets, count, tl.float64, False)
        total += g * g
        offset += BLOCK
    tl.store(out, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["chunks", "records", "partial_sums"])
def norm(chunks, records, partial_sums, KINDS: tl.constexpr):
    """The sum of squares of the gradient in one chunk, in float64. A program for each chunk of the model."""
    index = tl.program_id(0).to(tl.int64)
    chunk = chunks + index * _CHUNK_WORDS
    record = records + tl.load(chunk + 2) * _RECORD_WORDS
    grad = tl.load(record + _GRAD)
    count = tl.where(grad != 0, tl.load(chunk + 1), 0).to(tl.int32)
    kind = tl.load(record + _GROUP_AND_KIND) >> 32
    for j in tl.static_range(len(KINDS)):
        if kind == j:
            _sum_chunk(grad, tl.load(chunk), count, partial_sums + index, _DTYPES[KINDS[j][1]], 2 * KINDS[j][7])


@triton.jit(do_not_specialize=["partial_sums", "count", "sum_of_squares"])
def norm_total(partial_sums, count: tl.int64, sum_of_squares, BLOCK: tl.constexpr):
    """Add up the sums of all chunks in a fixed order. One program."""
    total = tl.zeros((BLOCK,), tl.float64)
    offset = tl.zeros((), tl.int64)
    while offset < count:
        i = offset + tl.arange(0, BLOCK)
        total += tl.load(partial_sums + i, mask=i < count, other=0.0)
        offset += BLOCK
    tl.store(sum_of_squares, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=[
        "groups",
        "group_count",
        "records",
        "record_count",
        "coefficients",
        "skip",
        "completed",
        "sum_of_squares",
        "grad_norm",
        "grad_scale",
        "found_inf",
        "measures_norm",
        "skip_nonfinite",
        "history_count",
        "history_rows",
        "history_slots",
        "history_width",
    ]
)
def prologue(
    groups,
    group_count: tl.int64,
    records,
    record_count: tl.int64,
    coefficients,
    skip,
    completed,
    sum_of_squares,
    grad_norm,
    grad_scale: tl.int64,
    found_inf: tl.int64,
    measures_norm: tl.int64,
    skip_nonfinite: tl.int64,
    history_count: tl.int64,
    history_rows: tl.int64,
    history_slots: tl.int64,
    history_width: tl.int64,
    BLOCK: tl.constexpr,
):
    """Decide whether to skip, and evaluate every rate once: program 0 for the reader, the others for `BLOCK` tensors.

    Counters are read, not advanced: where a launch fails, none has moved, and the history has no row of it.
    """
    t = tl.load(completed)
    scale = tl.load(grad_scale.to(tl.int64).to(tl.pointer_type(tl.float32)), mask=grad_scale != 0, other=1.0)
    found = tl.load(found_inf.to(tl.int64).to(tl.pointer_type(tl.float32)), mask=found_inf != 0, other=0.0)
    squares = tl.load(sum_of_squares)
    total_norm = tl.sqrt(squares) / scale.to(tl.float64)
    # The sum is in float64: it is finite if and only if every gradient is (below 1e150 in float64).
    skips = (found != 0.0) | ((skip_nonfinite != 0) & (squares - squares != 0.0))
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK).to(tl.int64)
    if program == 0:
        tl.store(skip, skips.to(tl.int64))
        if measures_norm != 0:
            tl.store(grad_norm, total_norm)
        if history_count != 0:
            row = _history_row(history_count, history_rows, history_slots, history_width)
            tl.store(row, t.to(tl.float64))
            tl.store(row + 1, skips.to(tl.float64))
            tl.store(row + 2, tl.where(measures_norm != 0, total_norm, float("nan")))
        offset = tl.zeros((), tl.int64)
        while offset < group_count:
            i = offset + lanes
            mask = i < group_count
            group = groups + i * _GROUP_WORDS
            lr = _rates(group, t, mask)
            if skips == 0:
                _leave(group, lr, mask)
                _leave(group + _WEIGHT_DECAY, _rates(group + _WEIGHT_DECAY, t, mask), mask)
            if history_count != 0:
                row = _history_row(history_count, history_rows, history_slots, history_width)
                columns = row + _HISTORY_COLUMNS + 2 * i
                tl.store(columns, lr, mask=mask)
                tl.store(columns + 1, _clip(_float64(group + _MAX_GRAD_NORM, mask), total_norm), mask=mask)
            offset += BLOCK
    else:
        i = (program - 1).to(tl.int64) * BLOCK + lanes
        record = records + i * _RECORD_WORDS
        mask = (i < record_count) & (tl.load(record + _GRAD, mask=i < record_count, other=0) != 0)
        group = groups + (tl.load(record + _GROUP_AND_KIND, mask=mask, other=0) & 0xFFFFFFFF) * _GROUP_WORDS
        lr = _rates(group, t, mask)
        weight_decay = _rates(group + _WEIGHT_DECAY, t, mask)
        beta1 = _float64(group + _BETA1, mask)
        beta2 = _float64(group + _BETA2, mask)
        multiplier = 1.0 / (tl.zeros_like(lr) + scale.to(tl.float64))
        multiplier *= _clip(_float64(group + _MAX_GRAD_NORM, mask), total_norm)
        multiplier = tl.where(tl.load(group + _MAXIMIZE, mask=mask, other=0) != 0, -multiplier, multiplier)
        step = tl.load(record + _STEP, mask=mask, other=0).to(tl.pointer_type(tl.float64))
        count = tl.load(step, mask=mask, other=0.0) + 1
        row = coefficients + i * _COEFFICIENTS
        tl.store(row, multiplier, mask=mask)
        tl.store(row + 1, lr * weight_decay, mask=mask)
        tl.store(row + 2, 1.0 - beta1, mask=mask)
        tl.store(row + 3, beta2, mask=mask)
        tl.store(row + 4, 1.0 - beta2, mask=mask)
        tl.store(row + 5, lr / bias_correction(beta1, count), mask=mask)
        tl.store(row + 6, 1.0 / tl.sqrt(bias_correction(beta2, count)), mask=mask)
        tl.store(row + 7, _float64(group + _EPS, mask), mask=mask)
        tl.store(row + 8, count, mask=mask)


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
    ALIGNED: tl.constexpr,
):
    params, lows, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs = streams
    _, i, count = place
    param = load_param(params, lows, place, T, HAS_MASTER, ALIGNED)
    grad = load(grads, i, count, T, ALIGNED)
    exp_avg = load_moment(exp_avgs, place, T, ALIGNED)
    exp_avg_sq = load_moment(exp_avg_sqs, place, T, ALIGNED)
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = load_moment(max_exp_avg_sqs, place, T, ALIGNED)
    param, exp_avg, exp_avg_sq, max_exp_avg_sq = adamw(
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, coefficients, AMSGRAD
    )
    store_param(params, lows, place, param, chance, HAS_MASTER, STOCHASTIC, ALIGNED)
    store_moment(exp_avgs, place, exp_avg, chance, ROUNDED_EXP_AVG, STOCHASTIC, ALIGNED)
    store_moment(exp_avg_sqs, place, exp_avg_sq, chance, ROUNDED_EXP_AVG_SQ, STOCHASTIC, ALIGNED)
    if AMSGRAD:
        store_moment(max_exp_avg_sqs, place, max_exp_avg_sq, chance, ROUNDED_MAX_EXP_AVG_SQ, STOCHASTIC, ALIGNED)


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
    BLOCK: tl.constexpr,
):
    T: tl.constexpr = PARAM if tl.float64 == PARAM else tl.float32
    HAS_MASTER: tl.constexpr = MASTER_LOW >= 0
    param_address = tl.load(record + _PARAM)
    low_address = tl.load(record + _MASTER_LOW)
    grad_address = tl.load(record + _GRAD)
    exp_avg_address = tl.load(record + _EXP_AVG)
    exp_avg_sq_address = tl.load(record + _EXP_AVG_SQ)
    max_address = tl.load(record + _MAX_EXP_AVG_SQ)
    streams = (
        stream_at(param_address, begin, PARAM),
        stream_at(low_address, begin, _DTYPES[MASTER_LOW]),
        stream_at(grad_address, begin, GRAD),
        _moment(exp_avg_address, record + _EXP_AVG_SCALE, begin, EXP_AVG),
        _moment(exp_avg_sq_address, record + _EXP_AVG_SQ_SCALE, begin, EXP_AVG_SQ),
        _moment(max_address, record + _MAX_EXP_AVG_SQ_SCALE, begin, EXP_AVG_SQ),
    )
    # Chunks begin at multiples of 16 elements: a stream is aligned where its tensor is.
    addresses = param_address | grad_address | exp_avg_address | exp_avg_sq_address | max_address
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
    )
    ordinal = tl.load(record + _ORDINAL).to(tl.uint32)
    chance = (seed, ordinal, tl.load(row + 8).to(tl.int64).to(tl.uint32), tl.load(record + _FIRST) + begin)
    offsets = tl.arange(0, BLOCK)
    offset = tl.zeros_like(count)
    while offset < full:
        _update_block(
            streams, (offset, offset + offsets, count), coefficients, chance, T, HAS_MASTER, AMSGRAD, STOCHASTIC, True
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
        chunk = chunks + index * _CHUNK_WORDS
        begin = tl.load(chunk)
        count = tl.load(chunk + 1).to(tl.int32)  # at most CHUNK_ELEMENTS
        tensor = tl.load(chunk + 2)
        record = records + tensor * _RECORD_WORDS
        if tl.load(record + _GRAD) != 0:
            if begin == 0:
                step = tl.load(record + _STEP).to(tl.pointer_type(tl.float64))
                tl.store(step, tl.load(step) + 1)
            kind = tl.load(record + _GROUP_AND_KIND) >> 32
            row = coefficients + tensor * _COEFFICIENTS
            for j in tl.static_range(len(KINDS)):
                if kind == j:
                    _update_chunk(
                        record,
                        begin,
                        count,
                        row,
                        seed,
                        _DTYPES[KINDS[j][0]],
                        _DTYPES[KINDS[j][1]],
                        _DTYPES[KINDS[j][2]],
                        _DTYPES[KINDS[j][3]],
                        KINDS[j][4],
                        KINDS[j][5],
                        KINDS[j][6],
                        KINDS[j][7],
                    )


@triton.jit(do_not_specialize=["segments", "rows", "steps", "count", "out"])
def evaluate(segments, rows: tl.int64, steps, count: tl.int64, out, BLOCK: tl.constexpr):
    """A schedule's values at `steps`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    t = tl.load(steps + i, mask=mask, other=0)
    tl.store(out + i, evaluate_schedule(segments, rows, t, mask), mask=mask)
