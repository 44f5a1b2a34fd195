"""The schedules against values worked out by hand, torch's own schedulers, their own lowering and every evaluator."""

import itertools
import json
import math
import pickle
from bisect import bisect_right
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts, LinearLR, LRScheduler

pytest.importorskip("hypothesis")
from hypothesis import example, given, settings
from hypothesis import strategies as st
from schedule_cases import assert_equal_to_oracle, boundaries

from nexus.schedules import MAX_STEP, WSD, Constant, Cosine, CosineRestarts, Curve, Schedule, Segment
from nexus.schedules.curves import MAX_SEGMENTS, NEVER, between
from nexus.schedules.wsd import WSD_DECAYS as DECAYS

ROOT2 = math.sqrt(2.0)

CASES = [
    WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=1e-3, min_lr=1e-5),
    WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=1e-3, decay_type="cosine"),
    WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=1e-3, min_lr=1e-5, decay_type="sqrt"),
    WSD(warmup_steps=0, stable_steps=20, decay_steps=30, peak_lr=1e-3),
    WSD(warmup_steps=10, stable_steps=0, decay_steps=30, peak_lr=1e-3),
    WSD(warmup_steps=0, stable_steps=0, decay_steps=1, peak_lr=1e-3, min_lr=1e-4),
    WSD(warmup_steps=1, stable_steps=1, decay_steps=1, peak_lr=1.0),
    WSD(warmup_steps=10, stable_steps=None, decay_steps=30, peak_lr=1e-3),
    WSD(warmup_steps=0, stable_steps=None, decay_steps=30, peak_lr=1e-3),
    WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=1e-3, min_lr=1e-3),
    WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=1e-3, min_lr=1e-4, warmup_start_lr=0.0),
    WSD(warmup_steps=MAX_STEP, stable_steps=MAX_STEP, decay_steps=MAX_STEP, peak_lr=0.3),
    WSD(warmup_steps=1000, stable_steps=MAX_STEP - 5000, decay_steps=4000, peak_lr=0.3),
    WSD(warmup_steps=MAX_STEP - 1, stable_steps=1, decay_steps=1, peak_lr=0.3),
    CosineRestarts(peak_lr=0.3, cycle_length=1, warmup_steps=MAX_STEP, cycle_mult=2),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=7),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=7, cycle_mult=2, warmup_steps=5),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=3, cycle_mult=1.1, warmup_steps=1),
    CosineRestarts(peak_lr=1e-3, cycle_length=1),
    CosineRestarts(peak_lr=1e-3, cycle_length=1, cycle_mult=1.001),
    CosineRestarts(peak_lr=1e-3, cycle_length=MAX_STEP, cycle_mult=1e308),
    Cosine(peak_lr=1e-3, total_steps=50, min_lr=1e-5, warmup_steps=10),
    Cosine(peak_lr=1e-3, total_steps=50, min_lr=1e-5, warmup_steps=10, warmup_start_lr=1e-3),
    CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=7, cycle_mult=2, warmup_steps=5, warmup_start_lr=3e-4),
    Cosine(peak_lr=1e-3, total_steps=1),
    Cosine(peak_lr=1e-3, total_steps=MAX_STEP, warmup_steps=MAX_STEP - 1),
    Constant(3e-4),
    Constant(0),
]


def interpret(segments: tuple[Segment, ...], t: int) -> float:
    """What every evaluator of the rows must do, in Python."""
    row = segments[bisect_right(segments, t, key=lambda segment: segment.start) - 1]
    return between(row.low, row.high, row.curve, (t - row.start) % row.period / row.period, row.k, row.q)


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_lowering_equals_formula(schedule: Schedule) -> None:
    segments = schedule.segments()
    assert segments[0].start == 0
    assert len(segments) <= MAX_SEGMENTS
    assert all(a.start <= b.start for a, b in itertools.pairwise(segments))
    assert all(1 <= row.period <= NEVER for row in segments)
    assert all(0 <= row.start <= MAX_STEP or row.start == NEVER for row in segments)
    assert all(int(float(row.start)) == row.start and int(float(row.period)) == row.period for row in segments)
    if isinstance(schedule, WSD):
        decay = DECAYS[schedule.decay_type]
        assert [row.curve for row in segments] == [Curve.RISE, Curve.CONSTANT, decay, Curve.CONSTANT]
        if schedule.stable_steps is None:
            assert [row.start for row in segments[2:]] == [NEVER, NEVER]
    for step in [*range(200), *boundaries(schedule)]:
        rate = schedule(step)
        assert rate == interpret(segments, step), step
        assert schedule.phase(step) != "stable" or rate == schedule.peak_lr
        assert schedule.phase(step) != "done" or rate == schedule.min_lr


peaks, shares, counts = st.floats(1e-12, 1e3), st.floats(0, 1), st.integers(0, 60) | st.integers(0, MAX_STEP)
lengths = st.integers(1, 60) | st.integers(1, MAX_STEP)
halves = st.integers(0, 60) | st.integers(0, 2**52 - 1)  # of MAX_STEP
wsd = st.builds(
    lambda w, s, d, peak, share, decay, first: WSD(
        warmup_steps=w,
        stable_steps=s,
        decay_steps=d,
        peak_lr=peak,
        min_lr=peak * share,
        decay_type=decay,
        warmup_start_lr=None if first is None else peak * first,
    ),
    *(counts, st.none() | counts, lengths, peaks, shares, st.sampled_from(list(DECAYS)), st.none() | shares),
)
restarts = st.builds(
    lambda peak, share, length, mult, w: CosineRestarts(
        peak_lr=peak, min_lr=peak * share, cycle_length=length, cycle_mult=mult, warmup_steps=w
    ),
    *(peaks, shares, lengths, st.just(1.0) | st.floats(1.01, 4) | st.floats(1.01, 1e308), counts),
)
cosine = st.builds(
    lambda peak, share, w, rest, first: Cosine(
        peak_lr=peak,
        total_steps=w + rest + 1,
        min_lr=peak * share,
        warmup_steps=w,
        warmup_start_lr=None if first is None else peak * first,
    ),
    *(peaks, shares, halves, halves, st.none() | shares),
)
schedules = wsd | restarts | cosine


@settings(max_examples=300, deadline=None)
@given(schedules, st.lists(st.integers(0, 300) | st.integers(0, MAX_STEP), max_size=20))
@example(WSD(warmup_steps=0, stable_steps=0, decay_steps=1, peak_lr=1.0), [])
@example(WSD(warmup_steps=0, stable_steps=None, decay_steps=1, peak_lr=1.0), [])
@example(WSD(warmup_steps=1, stable_steps=0, decay_steps=1, peak_lr=1.0, min_lr=1.0), [])
@example(CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=1.0), [])
@example(CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=3.0), [121])  # pytorch's goes astray there
@example(CosineRestarts(peak_lr=1.0, cycle_length=10, cycle_mult=1.1), [10**8, 10**8 + 1])
@example(Cosine(peak_lr=1.0, total_steps=1), [])
def test_any_schedule_equals_its_lowering_and_stays_in_range(schedule, steps) -> None:
    segments, steps = schedule.segments(), [*steps, *boundaries(schedule)]
    assert_equal_to_oracle(schedule, steps)
    # low + 1 * (high - low) may round one unit away from high.
    top = math.nextafter(schedule.peak_lr, math.inf)
    least = min(schedule.min_lr, schedule.min_lr if schedule.warmup_start_lr is None else schedule.warmup_start_lr)
    for step in steps:
        rate = schedule(step)
        assert rate == interpret(segments, step), step
        assert least <= rate <= top, step


@settings(max_examples=100, deadline=None)
@given(schedules, st.integers(0, 200))
def test_each_phase_is_monotone(schedule, start) -> None:
    for step in range(start, start + 100):
        phase = schedule.phase(step)
        if phase != schedule.phase(step + 1):
            continue
        before, after = schedule(step), schedule(step + 1)
        restart = isinstance(schedule, CosineRestarts) and schedule.cycle(step)[0] < schedule.cycle(step + 1)[0]
        if restart or phase == "warmup":
            assert before <= after
        elif phase in ("stable", "done"):
            assert before == after
        else:
            assert before >= after


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            WSD(warmup_steps=4, stable_steps=2, decay_steps=4, peak_lr=1.0),
            [0, 0.25, 0.5, 0.75, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0],
        ),
        (WSD(warmup_steps=2, stable_steps=1, decay_steps=2, peak_lr=3.0, min_lr=1.0), [1, 2, 3, 3, 2, 1, 1]),
        (
            WSD(warmup_steps=0, stable_steps=0, decay_steps=4, peak_lr=1.0, decay_type="sqrt"),
            [1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75), 0],
        ),
        (
            WSD(warmup_steps=0, stable_steps=0, decay_steps=4, peak_lr=1.0, decay_type="cosine"),
            [1, (2 + ROOT2) / 4, 0.5, (2 - ROOT2) / 4, 0],
        ),
        (WSD(warmup_steps=0, stable_steps=2, decay_steps=1, peak_lr=1.0), [1, 1, 1, 0, 0]),
        (WSD(warmup_steps=1, stable_steps=0, decay_steps=1, peak_lr=1.0), [0, 1, 0, 0]),
        (WSD(warmup_steps=2, stable_steps=None, decay_steps=1, peak_lr=1.0), [0, 0.5, 1, 1, 1, 1]),
        (CosineRestarts(peak_lr=1.0, cycle_length=2), [1, 0.5, 1, 0.5, 1]),
        (
            CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=2.0, warmup_steps=2),
            [0, 0.5, 1, 1, 0.5, 1, (2 + ROOT2) / 4, 0.5, (2 - ROOT2) / 4, 1],
        ),
        (CosineRestarts(peak_lr=3.0, min_lr=1.0, cycle_length=3), [3, 2.5, 1.5, 3]),
        (Cosine(peak_lr=1.0, total_steps=2), [1, 0.5, 0, 0]),
        (Cosine(peak_lr=3.0, total_steps=5, min_lr=1.0, warmup_steps=2), [1, 2, 3, 2.5, 1.5, 1, 1]),
        (Constant(0.5), [0.5, 0.5]),
    ],
    ids=repr,
)
def test_values_worked_out_by_hand(schedule: Schedule, expected: list[float]) -> None:
    assert schedule.values(0, len(expected)) == pytest.approx(expected, rel=1e-15, abs=1e-15)


def test_phases() -> None:
    def runs(schedule: Schedule, stop: int) -> list[tuple[str, int]]:
        return [(k, len(list(g))) for k, g in itertools.groupby(map(schedule.phase, range(stop)))]

    assert runs(WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1.0), 20) == [
        ("warmup", 3),
        ("stable", 4),
        ("decay", 5),
        ("done", 8),
    ]
    assert runs(WSD(warmup_steps=0, stable_steps=0, decay_steps=5, peak_lr=1.0), 10) == [("decay", 5), ("done", 5)]
    assert runs(WSD(warmup_steps=3, stable_steps=None, decay_steps=5, peak_lr=1.0), 10) == [
        ("warmup", 3),
        ("stable", 7),
    ]
    assert runs(CosineRestarts(peak_lr=1.0, cycle_length=2, warmup_steps=3), 10) == [("warmup", 3), ("cosine", 7)]
    assert runs(Cosine(peak_lr=1.0, total_steps=8, warmup_steps=3), 10) == [("warmup", 3), ("cosine", 5), ("done", 2)]
    assert runs(Constant(1.0), 10) == [("constant", 10)]


@pytest.mark.parametrize(
    ("schedule", "torchs"),
    [
        (
            WSD(warmup_steps=50, stable_steps=None, decay_steps=1, peak_lr=1e-3, min_lr=1e-4),
            partial(LinearLR, start_factor=0.1, total_iters=50),
        ),
        (
            WSD(warmup_steps=0, stable_steps=0, decay_steps=50, peak_lr=1e-3, min_lr=1e-5),
            partial(LinearLR, start_factor=1, end_factor=0.01, total_iters=50),
        ),
        (
            CosineRestarts(peak_lr=1e-3, min_lr=1e-5, cycle_length=10),
            partial(CosineAnnealingWarmRestarts, T_0=10, eta_min=1e-5),
        ),
        (
            CosineRestarts(peak_lr=1e-3, min_lr=1e-5, cycle_length=10, cycle_mult=2),
            partial(CosineAnnealingWarmRestarts, T_0=10, T_mult=2, eta_min=1e-5),
        ),
    ],
    ids=repr,
)
def test_convention_is_torchs(schedule: Schedule, torchs: Callable[[Optimizer], LRScheduler]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = torchs(optimizer)
    used = []
    for _ in range(400):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert schedule.values(0, 400) == pytest.approx(used, rel=1e-12)


def test_cosine_is_torchs_closed_form() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineAnnealingLR(optimizer, T_max=1000, eta_min=1e-5)
    schedule = Cosine(peak_lr=1e-3, total_steps=1000, min_lr=1e-5)
    for epoch in range(1001):
        scheduler.last_epoch = epoch
        assert schedule(epoch) == pytest.approx(scheduler._get_closed_form_lr()[0], rel=1e-12)


def brute_force_cycles(length: int, mult: float):
    for index in itertools.count():
        steps = int(length * mult**index)
        for step in range(steps):
            yield index, step, steps


@pytest.mark.parametrize("length", [1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("mult", [1.0, 1.001, 1.1, 1.5, 2.0, 3.0, math.pi, 1000.0])
@pytest.mark.parametrize("warmup", [0, 3])
def test_cycles_equal_a_loop_over_every_step(length: int, mult: float, warmup: int) -> None:
    schedule = CosineRestarts(peak_lr=1.0, cycle_length=length, cycle_mult=mult, warmup_steps=warmup)
    for step, expected in enumerate(itertools.islice(brute_force_cycles(length, mult), 5000), warmup):
        assert schedule.cycle(step) == expected


def test_cycle_that_a_logarithm_gets_wrong() -> None:
    # 1 + 3 + 9 + 27 + 81 = 121, where log(121 * 2 + 1, 3) is just under 5.
    schedule = CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=3)
    assert [schedule.cycle(step) for step in (120, 121)] == [(4, 80, 81), (5, 0, 243)]
    assert schedule(121) == 1.0


@pytest.mark.parametrize(
    ("schedule", "cycles", "rows"),
    [
        (
            CosineRestarts(peak_lr=1.0, cycle_length=10, warmup_steps=4),
            {3: (-1, 3, 4), 4: (0, 0, 10), MAX_STEP: ((MAX_STEP - 4) // 10, (MAX_STEP - 4) % 10, 10)},
            [4, 10],
        ),
        (
            CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=2),
            {2**n - 1: (n, 0, 2**n) for n in (20, 31, 52, 53)}
            | {2**n - 2: (n - 1, 2 ** (n - 1) - 1, 2 ** (n - 1)) for n in (20, 31, 52, 53)},
            [1, *(2**n for n in range(54))],
        ),
        # Longer than any run, they stay in int64.
        (CosineRestarts(peak_lr=1.0, cycle_length=1000, cycle_mult=1e300), {1000: (1, 0, NEVER)}, [1, 1000, NEVER]),
        # T_i = int(10 * (1 + 2**-52)**i) stays 10 for 4e14 cycles.
        (
            CosineRestarts(peak_lr=1.0, cycle_length=10, cycle_mult=math.nextafter(1.0, 2.0)),
            {10**12: (10**11, 0, 10)},
            [1, 10, 11, 12],
        ),
    ],
    ids=["equal", "doubling", "longer than any run", "a billion equal ones"],
)
def test_cycles_far_out(schedule: CosineRestarts, cycles: dict[int, tuple[int, int, int]], rows: list[int]) -> None:
    for step, cycle in cycles.items():
        assert schedule.cycle(step) == cycle
    assert [row.period for row in schedule.segments()] == rows
    assert NEVER == 2**62


@pytest.mark.parametrize("length", [1, 100, 2500, 10_000, 10**7, MAX_STEP])
def test_smallest_promised_cycle_mult_fits(length: int) -> None:
    assert len(CosineRestarts(peak_lr=1.0, cycle_length=length, cycle_mult=1.0004).segments()) <= MAX_SEGMENTS


@pytest.mark.parametrize("stable", [20, None])
@pytest.mark.parametrize("kind", DECAYS)
def test_begin_decay_goes_on_from_the_rate_of_that_moment(stable: int | None, kind: str) -> None:
    schedule = WSD(warmup_steps=10, stable_steps=stable, decay_steps=30, peak_lr=1e-3, min_lr=1e-5, decay_type=kind)
    for step in range(1, 30):
        shortened = schedule.begin_decay(step)
        assert shortened.phase(step) == "decay"
        assert shortened.values(0, step) == pytest.approx(schedule.values(0, step), rel=1e-14)
        assert shortened(step) == pytest.approx(schedule(step), rel=1e-15)
        assert shortened(step + 30) == 1e-5
        assert shortened.phase(step + 30) == "done"
        assert shortened.decay_steps == 30


def test_edits_at_the_edges() -> None:
    schedule = WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=1e-3, min_lr=1e-5, decay_type="sqrt")
    for step in (30, 31, 59, 60, 1000):
        assert schedule.begin_decay(step) is schedule
    assert schedule.begin_decay(10) == WSD(
        warmup_steps=10, stable_steps=0, decay_steps=30, peak_lr=1e-3, min_lr=1e-5, decay_type="sqrt"
    )
    assert schedule.begin_decay(0) == WSD(
        warmup_steps=0, stable_steps=0, decay_steps=30, peak_lr=1e-5, min_lr=1e-5, decay_type="sqrt"
    )
    assert schedule.extend_stable(5) == WSD(
        warmup_steps=10, stable_steps=25, decay_steps=30, peak_lr=1e-3, min_lr=1e-5, decay_type="sqrt"
    )
    assert schedule.extend_stable(0) == schedule


@pytest.mark.parametrize("schedule", CASES, ids=repr)
def test_plain_types_survive_json_pickle_and_torch_load(schedule: Schedule, tmp_path) -> None:
    written = schedule.to_dict()
    assert written["type"] == type(schedule).__name__
    assert {type(value) for value in written.values()} <= {str, int, float, type(None)}
    torch.save(written, tmp_path / "schedule.pt")
    for read in (written, json.loads(json.dumps(written)), torch.load(tmp_path / "schedule.pt")):
        again = Schedule.from_dict(read)
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert type(again) is type(schedule)
    assert pickle.loads(pickle.dumps(schedule)) == deepcopy(schedule) == schedule
    assert eval(repr(schedule)) == schedule


def test_equality_is_by_type_and_value() -> None:
    assert len(set(CASES)) == len(CASES)
    assert WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0) == WSD(
        warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, min_lr=0.0, decay_type="linear"
    )
    assert WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0) != WSD(
        warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, min_lr=0.5
    )
    assert Cosine(peak_lr=1.0, total_steps=10) != CosineRestarts(peak_lr=1.0, min_lr=0.0, cycle_length=10)


@pytest.mark.parametrize("schedule", CASES, ids=repr)
@pytest.mark.parametrize("factor", [0.1, 2, 1e-6, np.float64(0.5), np.float32(0.5), np.int64(3)])
def test_scaling_multiplies_the_rates(schedule: Schedule, factor: float) -> None:
    scaled = factor * schedule
    assert scaled == schedule * factor
    assert type(scaled) is type(schedule)
    for step in boundaries(schedule)[:100]:
        assert scaled(step) == pytest.approx(float(factor) * schedule(step), rel=1e-12, abs=1e-18)
        assert scaled.phase(step) == schedule.phase(step)


def test_numpy_numbers_become_plain() -> None:
    schedule = WSD(
        warmup_steps=np.int64(4),
        stable_steps=np.int32(5),
        decay_steps=np.uint8(6),
        peak_lr=np.float64(1.0),
        min_lr=np.float32(0.5),
        decay_type=np.str_("sqrt"),
        decay_power=np.float32(3),
    )
    assert [type(value) for value in schedule.to_dict().values()] == [str, int, int, int, float, float, str, float]
    # 250 + 250 would wrap in uint8.
    assert WSD(warmup_steps=100, stable_steps=100, decay_steps=100, peak_lr=1.0)(np.uint8(250)) == 0.5
    assert type(schedule(np.int64(1))) is float


@pytest.mark.parametrize(
    ("total", "warmup", "decay", "steps"),
    [
        (1000, 0.1, 0.2, (100, 700, 200)),
        (10, 0.25, 0.75, (2, 0, 8)),
        (3, 0.5, 0.5, (1, 0, 2)),
        (1, 1.0, 0.0, (0, 0, 1)),
        (7, 0.0, 0.0, (0, 6, 1)),
    ],
)
def test_shares_of_a_run(total: int, warmup: float, decay: float, steps: tuple[int, int, int]) -> None:
    made = WSD.from_fractions(total, warmup=warmup, decay=decay, peak_lr=1e-3, min_lr=1e-5, decay_type="cosine")
    assert (made.warmup_steps, made.stable_steps, made.decay_steps) == steps
    assert (made.peak_lr, made.min_lr, made.decay_type) == (1e-3, 1e-5, "cosine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.1, 0.2, 1.0), "total_steps must be an int from 1"),
        ((10, 1.5, 0.2, 1.0), "warmup must be .* from 0 to 1, got 1.5"),
        ((10, 0.5, 0.6, 1.0), "warmup and decay must be 1 in all at most, got 0.5 and 0.6"),
        ((10, 0.5, 0.2, 0.0), "peak_lr must be"),
    ],
)
def test_shares_that_are_none(arguments: tuple[Any, ...], words: str) -> None:
    total, warmup, decay, peak_lr = arguments
    with pytest.raises(ValueError, match=words):
        WSD.from_fractions(total, warmup=warmup, decay=decay, peak_lr=peak_lr)
