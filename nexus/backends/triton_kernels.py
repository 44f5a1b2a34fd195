"""The kernels of the Triton backend. A step is `norm`, `norm_total` (where a norm is wanted), `prologue`, `update`.

They find everything through the tables of `nexus.backends.triton_tables`. Where a chunk begins is an int64, since
a tensor may have more than 2**31 elements; within a chunk, an int32 will do, and takes fewer registers.
"""
# mypy: ignore-errors
# What is decorated here is compiled by Triton, whose types are not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from nexus.backends.interface import HISTORY_COLUMNS
from nexus.backends.records import layout
from nexus.backends.triton_codecs import load, stream_at
from nexus.backends.triton_math import bias_correction, evaluate_schedule
from nexus.backends.triton_update import update
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

__all__ = ["evaluate", "norm", "norm_total", "prologue", "update"]

_GROUP_WORDS = tl.constexpr(layout("Group").words)
_WEIGHT_DECAY = word("Group", "weight_decay.value")
_BETA1 = word("Group", "beta1")
_BETA2 = word("Group", "beta2")
_EPS = word("Group", "eps")
_MAX_GRAD_NORM = word("Group", "max_grad_norm")
_MAXIMIZE = word("Group", "maximize")
_AVERAGE_DECAY = word("Group", "average_decay.value")
_VALUE = word("Rate", "value")
_TENSOR = word("Rate", "tensor")
_IS_FLOAT64 = word("Rate", "is_float64")
_TABLE = word("Rate", "table")
_LAYERS = word("Rate", "layers")
_ROWS = word("Rate", "rows")
_CLOCK = word("Rate", "clock")
_SCALE = word("Rate", "scale")
_LAST = word("Rate", "last")
_HISTORY_COLUMNS = tl.constexpr(HISTORY_COLUMNS)


@triton.jit
def _float64(words, mask):
    return tl.load(words, mask=mask, other=0).to(tl.float64, bitcast=True)


@triton.jit
def _rates(words, t, mask):
    """The rates at step t of a block of groups; `words` points to each one's record `Rate`."""
    tensor = tl.load(words + _TENSOR, mask=mask, other=0)
    is_float64 = tl.load(words + _IS_FLOAT64, mask=mask, other=0) != 0
    table = tl.load(words + _TABLE, mask=mask, other=0)
    layers = tl.load(words + _LAYERS, mask=mask, other=0)
    rows = tl.load(words + _ROWS, mask=mask, other=0)
    given = tensor != 0
    narrow = tl.load(tensor.to(tl.pointer_type(tl.float32)), mask=given & (is_float64 == 0), other=0.0)
    wide = tl.load(tensor.to(tl.pointer_type(tl.float64)), mask=given & is_float64, other=0.0)
    rate = tl.where(given, tl.where(is_float64, wide, narrow.to(tl.float64)), _float64(words + _VALUE, mask))
    scheduled = table != 0
    clock = tl.load(words + _CLOCK, mask=mask, other=0)
    steps = tl.load(clock.to(tl.pointer_type(tl.int64)), mask=clock != 0, other=0)
    steps = tl.where(clock != 0, steps, t)
    value = evaluate_schedule(table.to(tl.pointer_type(tl.float64)), layers, rows, steps, scheduled)
    return tl.where(scheduled, _float64(words + _SCALE, mask) * value, rate)


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
    chunk = chunks + index * CHUNK_WORDS
    record = records + tl.load(chunk + 2) * RECORD_WORDS
    grad = tl.load(record + GRAD_WORD)
    count = tl.where(grad != 0, tl.load(chunk + 1), 0).to(tl.int32)
    kind = tl.load(record + GROUP_AND_KIND_WORD) >> 32
    for j in tl.static_range(len(KINDS)):
        if kind == j:
            _sum_chunk(grad, tl.load(chunk), count, partial_sums + index, DTYPES[KINDS[j][1]], 2 * KINDS[j][8])


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
        record = records + i * RECORD_WORDS
        mask = (i < record_count) & (tl.load(record + STEP_WORD, mask=i < record_count, other=0) != 0)
        group = groups + (tl.load(record + GROUP_AND_KIND_WORD, mask=mask, other=0) & 0xFFFFFFFF) * _GROUP_WORDS
        lr = _rates(group, t, mask)
        weight_decay = _rates(group + _WEIGHT_DECAY, t, mask)
        beta1 = _float64(group + _BETA1, mask)
        beta2 = _float64(group + _BETA2, mask)
        multiplier = 1.0 / (tl.zeros_like(lr) + scale.to(tl.float64))
        multiplier *= _clip(_float64(group + _MAX_GRAD_NORM, mask), total_norm)
        multiplier = tl.where(tl.load(group + _MAXIMIZE, mask=mask, other=0) != 0, -multiplier, multiplier)
        step = tl.load(record + STEP_WORD, mask=mask, other=0).to(tl.pointer_type(tl.float64))
        count = tl.load(step, mask=mask, other=0.0) + 1
        row = coefficients + i * COEFFICIENT_WORDS
        tl.store(row, multiplier, mask=mask)
        tl.store(row + 1, lr * weight_decay, mask=mask)
        tl.store(row + 2, 1.0 - beta1, mask=mask)
        tl.store(row + 3, beta2, mask=mask)
        tl.store(row + 4, 1.0 - beta2, mask=mask)
        tl.store(row + 5, lr / bias_correction(beta1, count), mask=mask)
        tl.store(row + 6, 1.0 / tl.sqrt(bias_correction(beta2, count)), mask=mask)
        tl.store(row + 7, _float64(group + _EPS, mask), mask=mask)
        average_weight = 1.0 - _rates(group + _AVERAGE_DECAY, t, mask)
        tl.store(row + 8, tl.where(count == 1.0, 1.0, average_weight), mask=mask)
        tl.store(row + 9, count, mask=mask)


@triton.jit(do_not_specialize=["table", "layers", "rows", "steps", "count", "out"])
def evaluate(table, layers: tl.int64, rows: tl.int64, steps, count: tl.int64, out, BLOCK: tl.constexpr):
    """A schedule's values at `steps`."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    t = tl.load(steps + i, mask=mask, other=0)
    tl.store(out + i, evaluate_schedule(table, layers, rows, t, mask), mask=mask)
