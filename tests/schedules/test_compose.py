"""Schedules made of schedules: what each is, by hand, and random ones part by part against every evaluator."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedule_cases import assert_within_rounding

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
    evaluate,
    join,
    maximum,
    minimum,
)
from nexus.schedules.compose import Cooldown, Fold, Joined, Repeated, Warmup
from nexus.schedules.curves import MAX_LAYERS, MAX_SEGMENTS, Layer, segment, value_of
from nexus.schedules.splice import spliced

UP, DOWN = Linear(start_lr=0.0, end_lr=1.0, total_steps=4), Linear(start_lr=1.0, end_lr=0.0, total_steps=4)
BY_HAND = [
    (join([UP, DOWN], [3]), [0.0, 0.25, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (join([UP, Constant(9.0), DOWN], [2, 2]), [0.0, 0.25, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (join([DOWN], []), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (UP.then(DOWN), [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (DOWN.repeat(2), [1.0, 0.75, 0.5, 0.25, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (DOWN.repeat(1), [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (WSD(warmup_steps=0, stable_steps=1, decay_steps=2, peak_lr=1.0).repeat(), [1.0, 1.0, 0.5] * 4),
    (
        WSD(warmup_steps=0, stable_steps=1, decay_steps=2, peak_lr=1.0).repeat(2),
        [1.0, 1.0, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0],
    ),
    (
        join([WSD(warmup_steps=0, stable_steps=1, decay_steps=2, peak_lr=1.0).repeat(), Constant(0.25)], [5]),
        [1.0, 1.0, 0.5, 1.0, 1.0, 0.25, 0.25],
    ),
    (
        join([Constant(0.25), WSD(warmup_steps=0, stable_steps=1, decay_steps=2, peak_lr=1.0).repeat()], [2]),
        [0.25, 0.25, *[1.0, 1.0, 0.5] * 3],
    ),
    (join([CosineRestarts(peak_lr=1.0, cycle_length=2), UP], [3]), [1.0, 0.5000000000000001, 1.0, 0.0, 0.25, 0.5]),
    (Sampled([1.0, 0.5, 2.0]).then(Sampled([4.0, 8.0], every=2)), [1.0, 0.5, 4.0, 6.0, 8.0, 8.0]),
    (DOWN.warmup(2), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]),
    (DOWN.warmup(2, start=0.5), [0.5, 0.75, 1.0, 0.75]),
    (Constant(1.0).warmup(2, start=3.0), [3.0, 2.0, 1.0, 1.0]),
    (Constant(1.0).warmup(4, count="(t+1)/W"), [0.25, 0.5, 0.75, 1.0, 1.0]),
    (Constant(1.0).warmup(3, count="(t+1)/(W+1)"), [0.25, 0.5, 0.75, 1.0, 1.0]),
    (Constant(1.0).warmup(2, kind="cosine"), [0.0, 0.4999999999999999, 1.0, 1.0]),
    (Constant(1.0).warmup(4, kind="sqrt"), [0.0, 0.5, 0.7071067811865476, 0.8660254037844386, 1.0]),
    (UP.cooldown(2), [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0, 0.0]),
    (UP.cooldown(2, to=0.5), [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.5]),
    (UP.cooldown(4, kind="sqrt"), [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 1.0 - 0.5**0.5, 1.0 - 0.75**0.5, 0.0]),
    (UP * DOWN, [0.0, 0.1875, 0.25, 0.1875, 0.0, 0.0]),
    (UP + DOWN, [1.0] * 6),
    (UP + Constant(0.5) * UP, [0.0, 0.375, 0.75, 1.125, 1.5, 1.5]),
    (minimum(UP, DOWN), [0.0, 0.25, 0.5, 0.25, 0.0, 0.0]),
    (maximum(UP, DOWN), [1.0, 0.75, 0.5, 0.75, 1.0, 1.0]),
    (UP.clip(0.25, 0.75), [0.25, 0.25, 0.5, 0.75, 0.75, 0.75]),
    (2.0 * (UP * DOWN + Constant(1.0)), [2.0, 2.375, 2.5, 2.375, 2.0, 2.0]),
    (0.5 * UP.warmup(2, start=1.0).cooldown(2, to=0.25), [0.5, 0.25, 0.0, 0.125, 0.25, 0.375, 0.5, 0.3125, 0.125]),
    ((UP * DOWN).repeat(), [0.0, 0.1875, 0.25, 0.1875] * 2),
    (join([UP * Constant(2.0), DOWN, DOWN + UP], [2, 4]), [0.0, 0.5, 1.0, 0.75, 1.0, 1.0]),
    (join([minimum(UP, Constant(0.1)), DOWN, maximum(DOWN, Constant(0.9))], [2, 4]), [0.0, 0.1, 1.0, 0.75, 1.0, 0.9]),
]
"""The schedules, and their first rates."""


@pytest.mark.parametrize(("schedule", "rates"), BY_HAND, ids=repr)
def test_values_by_hand(schedule: Schedule, rates: list[float]) -> None:
    assert schedule.values(0, len(rates)) == pytest.approx(rates, rel=1e-15, abs=1e-16)
    for backend in ("native", "cuda on cpu"):
        values = evaluate(schedule, torch.arange(len(rates)), backend=backend)
        assert values.tolist() == schedule.values(0, len(rates))


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in BY_HAND], ids=repr)
def test_composites_are_values(schedule: Schedule) -> None:
    again = eval(repr(schedule))  # the code that made it
    for other in (again, Schedule.from_dict(json.loads(json.dumps(schedule.to_dict())))):
        assert other == schedule
        assert hash(other) == hash(schedule)
    scaled = 4.0 * schedule
    assert type(scaled) is type(schedule)
    assert scaled.values(0, 12) == [4.0 * rate for rate in schedule.values(0, 12)]
    assert schedule * 4 == scaled


def test_phases_and_lengths() -> None:
    wsd = WSD(warmup_steps=2, stable_steps=2, decay_steps=2, peak_lr=1.0)
    joined = wsd.warmup(1).then(DOWN).cooldown(2)
    cases: list[tuple[Schedule, int | None, list[str]]] = [
        (join([wsd, UP], [3]), 7, [*[wsd.phase(i) for i in range(3)], *[UP.phase(i) for i in range(6)]]),
        (wsd.repeat(2), 12, [wsd.phase(i % 6) for i in range(12)] + ["done"] * 2),
        (wsd.repeat(), None, [wsd.phase(i % 6) for i in range(15)]),
        (wsd * UP, 6, [wsd.phase(i) for i in range(9)]),
        (wsd + UP.repeat(), None, [wsd.phase(i) for i in range(9)]),
        (UP.cooldown(2), 6, [*[UP.phase(i) for i in range(4)], "cooldown", "cooldown", "done"]),
        (joined, 13, ["warmup", *[wsd.phase(i) for i in range(6)], *[DOWN.phase(i) for i in range(4)], "cooldown"]),
        (
            WSD(warmup_steps=1, stable_steps=None, decay_steps=1, peak_lr=1.0).warmup(3),
            None,
            ["warmup"] * 4 + ["stable"],
        ),
    ]
    for schedule, length, phases in cases:
        assert schedule.length == length
        assert [schedule.phase(i) for i in range(len(phases))] == phases


def test_bounds_that_do_nothing_are_left_out() -> None:
    assert UP.clip() is UP
    assert UP.clip(high=0.5) == minimum(UP, Constant(0.5))
    assert UP.clip(low=0.5) == maximum(UP, Constant(0.5))


def test_rows_that_repeat_by_their_period_are_one_row() -> None:
    assert len((UP.repeat(10**9)).layers()[0].segments) == 3
    assert len(join([UP.repeat(), DOWN], [10**12]).layers()[0].segments) == 3


RATES = st.floats(0.0, 2.0)
PEAKS = st.floats(0.01, 2.0)
STEPS = st.integers(1, 40)
LEAVES = st.one_of(
    st.builds(Constant, RATES),
    st.builds(Linear, start_lr=RATES, end_lr=RATES, total_steps=STEPS),
    st.builds(
        WSD,
        warmup_steps=STEPS,
        stable_steps=STEPS,
        decay_steps=STEPS,
        peak_lr=PEAKS,
        decay_type=st.sampled_from(["linear", "cosine", "sqrt"]),
    ),
    st.builds(
        CosineRestarts, peak_lr=PEAKS, cycle_length=STEPS, cycle_mult=st.sampled_from([1.0, 2.0]), warmup_steps=STEPS
    ),
    st.builds(
        lambda peak, warmup, rest: Cosine(peak_lr=peak, total_steps=warmup + rest, min_lr=0.0, warmup_steps=warmup),
        PEAKS,
        STEPS,
        STEPS,
    ),
    st.builds(Polynomial, peak_lr=PEAKS, total_steps=STEPS, power=st.sampled_from([0.5, 1.0, 2.0, 0.9])),
    st.builds(Exponential, peak_lr=PEAKS, gamma=st.floats(0.5, 1.0), every=STEPS),
    st.builds(StepDecay, peak_lr=PEAKS, gamma=st.floats(0.5, 1.0), every=STEPS),
    st.builds(
        MultiStep,
        peak_lr=PEAKS,
        milestones=st.lists(STEPS, max_size=3).map(sorted).map(tuple),
        gamma=st.floats(0.1, 1.0),
    ),
    st.builds(InverseSqrt, peak_lr=PEAKS, timescale=STEPS),
    st.builds(OneCycle, peak_lr=PEAKS, total_steps=STEPS, kind=st.sampled_from(["linear", "cosine"])),
    st.builds(Cyclic, base_lr=st.just(0.0), peak_lr=PEAKS, up_steps=STEPS, down_steps=STEPS),
    st.builds(
        lambda warmup, stable, decay, peak, cycles: WSDS(
            warmup_steps=warmup, cycle_length=stable + decay, decay_steps=decay, peak_lr=peak, cycles=cycles
        ),
        *(STEPS, STEPS, STEPS, PEAKS, st.sampled_from([None, 1, 3])),
    ),
    st.builds(Sampled, st.lists(RATES, min_size=1, max_size=9).map(tuple), every=STEPS),
    st.builds(
        lambda rates, every, kind: Piecewise([(i * every, rate) for i, rate in enumerate(rates)], kind=kind),
        *(st.lists(RATES, min_size=1, max_size=5), STEPS, st.sampled_from(["constant", "linear"])),
    ),
)


REFUSALS = ("layers", "needs a schedule with an end", "common sequence", "repeats of", "n must be an int from 1 to")


def larger(parts: st.SearchStrategy[Schedule]) -> st.SearchStrategy[Schedule]:
    """Compositions of such parts; one that is refused is its first part."""

    def made(make: object, *arguments: object) -> Schedule:
        try:
            return make(*arguments)  # type: ignore[operator]
        except ValueError as error:
            if not any(word in str(error) for word in REFUSALS):
                raise
            first = arguments[0]
            return first if isinstance(first, Schedule) else first[0]  # type: ignore[index]

    def joined(schedules: list[Schedule], lengths: list[int]) -> Schedule:
        return made(join, schedules, [sum(lengths[: i + 1]) for i in range(len(schedules) - 1)])

    kinds = st.sampled_from(["linear", "cosine", "sqrt"])
    counts = st.sampled_from(["t/W", "(t+1)/W", "(t+1)/(W+1)"])
    times = st.sampled_from([None, 1, 2, 3, 7])
    operations = st.sampled_from(["*", "+", "minimum", "maximum"])
    fours = st.lists(st.integers(0, 90) | st.integers(0, 2**51), min_size=4, max_size=4)
    return st.one_of(
        st.builds(joined, st.lists(parts, min_size=1, max_size=4), fours),
        st.builds(lambda *given: made(Repeated, *given), parts, times),
        st.builds(lambda *given: made(Warmup, *given), parts, STEPS, RATES, kinds, counts),
        st.builds(lambda *given: made(Cooldown, *given), parts, STEPS, RATES, kinds),
        st.builds(lambda *given: made(Fold, *given), parts, parts, operations),
        st.builds(lambda schedule, factor: factor * schedule, parts, st.floats(0.1, 3.0)),
    )


IEEE = {Curve.CONSTANT, Curve.RISE, Curve.LINEAR, Curve.SQRT, Curve.SAMPLED}
"""Curves without the math library's help."""

COMPOSITIONS = st.recursive(LEAVES, larger, max_leaves=8)


@settings(max_examples=120, deadline=None)
@given(COMPOSITIONS, st.lists(st.integers(0, MAX_STEP), max_size=5), st.lists(st.integers(0, 600), max_size=30))
def test_random_compositions_are_the_same_part_by_part_and_by_every_evaluator(
    schedule: Schedule, far: list[int], near: list[int]
) -> None:
    layers = schedule.layers()
    assert 1 <= len(layers) <= MAX_LAYERS
    edges = {0, 2**31, MAX_STEP} | {row.start for layer in layers for row in layer.segments[:40]}
    around = {edge + offset for edge in edges for offset in (-2, -1, 0, 1, 2)}
    steps = sorted(step for step in around | set(far) | set(near) if 0 <= step <= MAX_STEP)
    oracle = [schedule(step) for step in steps]
    assert [value_of(layers, step) for step in steps] == oracle
    expected, at = torch.tensor(oracle, dtype=torch.float64), torch.tensor(steps)
    for backend in ("native", "cuda on cpu"):
        assert torch.equal(evaluate(schedule, at, backend=backend), expected)
    exact = all(row.curve in IEEE for layer in layers for row in layer.segments)
    for backend in ("reference", "triton"):
        values = evaluate(schedule, at, backend=backend)
        if exact:
            assert torch.equal(values, expected)
        else:
            assert_within_rounding(values, expected)
    assert Schedule.from_dict(schedule.to_dict()) == schedule
    assert eval(repr(schedule)) == schedule


ROWS = st.lists(
    st.tuples(st.sampled_from([Curve.RISE, Curve.LINEAR, Curve.CONSTANT]), STEPS, STEPS), min_size=1, max_size=4
)


@st.composite
def repeating(draw: st.DrawFn) -> Layer:
    """A layer whose rows have any periods, which repeats from any step on."""
    begin, rows = 0, []
    for curve, length, period in draw(ROWS):
        rows.append(segment(curve, begin, period, 1.0, 0.25, offset=draw(st.sampled_from([0.0, 1.0, 3.0]))))
        begin += length
    start = draw(st.just(rows[-1].start) | st.integers(0, 150))
    return Layer(tuple(rows), repeat_start=start, repeat_length=draw(STEPS))


@given(repeating(), repeating(), st.integers(0, 300))
def test_layers_that_repeat_from_the_midst_of_a_row_keep_their_place(
    first: Layer, second: Layer, boundary: int
) -> None:
    layers = spliced([(first,), (second,)], [boundary])
    expected = [value_of((first,), step) for step in range(boundary)]
    expected += [value_of((second,), step) for step in range(300)]
    assert [value_of(layers, step) for step in range(boundary + 300)] == expected


def test_a_part_that_cannot_keep_its_bits_is_refused() -> None:
    layer = Layer((segment(Curve.RISE, 0, 4, 1.0, offset=0.1),), repeat_start=3, repeat_length=6)
    with pytest.raises(ValueError, match=r"repeats from the midst of Segment.* must have a whole offset"):
        spliced([(layer,), (layer,)], [20])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: join([UP, DOWN], [3, 4]), ValueError, "boundaries must be one less .*: 1 for 2, got 2"),
        (lambda: join([UP, DOWN, UP], [4, 3]), ValueError, r"must ascend, but boundaries\[1\]=3 is below 4"),
        (lambda: join([UP, DOWN], [-1]), ValueError, r"boundaries\[0\] must be an int from 0 to 2\*\*53"),
        (lambda: join([UP, DOWN], [1.0]), TypeError, r"boundaries\[0\] must be .*write int\(1.0\)"),
        (lambda: join([UP, DOWN], 3), TypeError, "boundaries must be a list, got 3"),
        (lambda: join([], []), ValueError, "at least one schedule, got none"),
        (lambda: join(UP, []), TypeError, "schedules must be a list"),
        (
            lambda: join([UP, 0.1], [3]),
            TypeError,
            r"schedules\[1\] must be a nexus Schedule, got 0.1 .*Constant\(lr\)",
        ),
        (
            lambda: InverseSqrt(peak_lr=1.0, timescale=4).then(UP),
            ValueError,
            r"then needs .*never stays.*join\(\[...\], \[step\]\)",
        ),
        (lambda: Constant(1.0).then(UP), ValueError, "then needs .*stays at one rate from step 0 on"),
        (lambda: UP.repeat().repeat(2), ValueError, "repeat needs a schedule with an end"),
        (
            lambda: InverseSqrt(peak_lr=1.0, timescale=4).cooldown(3),
            ValueError,
            "cooldown needs a schedule with an end",
        ),
        (lambda: UP.repeat(0), ValueError, r"n must be an int from 1 to \d+ or None \(for ever\)"),
        (lambda: UP.repeat(2**52), ValueError, "n must be an int from 1 to 2251799813685248 or"),
        (
            lambda: WSD(warmup_steps=1, stable_steps=1, decay_steps=1, peak_lr=1.0).repeat(10**5),
            ValueError,
            r"99,999 repeats of 3 rows .* at most 21,845 repeats",
        ),
        (
            lambda: join([Constant(1.0)] * 65_537, list(range(1, 65_537))),
            ValueError,
            "65,537 rows in a layer; 65,536",
        ),
        (lambda: UP.warmup(0), ValueError, "steps must be an int from 1"),
        (lambda: UP.warmup(3, start=-1.0), ValueError, "start must be a finite number >= 0"),
        (lambda: UP.warmup(3, kind="steep"), ValueError, "kind must be one of .*'sqrt'.*got 'steep'"),
        (lambda: UP.warmup(3, count="W"), ValueError, r"count must be one of .*\(t\+1\)/W"),
        (lambda: UP.cooldown(0), ValueError, "steps must be an int from 1"),
        (lambda: UP.clip(0.5, 0.25), ValueError, "low must be at most high=0.25, got 0.5"),
        (lambda: UP.clip(high=float("nan")), ValueError, "high must be a finite number"),
        (lambda: UP * UP * UP * UP * UP, ValueError, "has 5 layers; 4 are allowed"),
        (lambda: (UP * UP) * (UP + UP), ValueError, "at most one operand of several layers.*2 and 2 layers"),
        (
            lambda: join([UP * UP + UP, minimum(maximum(UP, UP), UP)], [3]),
            ValueError,
            "MAX MIN; TIMES PLUS; join bef",
        ),
        (lambda: UP + 0.5, TypeError, r"right must be a nexus Schedule, got 0.5 .*Constant\(lr\)"),
        (lambda: UP * "2", TypeError, "must be a number > 0 or a nexus Schedule, got '2'"),
        (lambda: -1.0 * (UP + DOWN), ValueError, "factor must be a finite number > 0"),
        (lambda: minimum(UP, 1.0), TypeError, "right must be a nexus Schedule"),
        (lambda: Fold(UP, DOWN, "-"), ValueError, r"op must be one of .*'maximum'"),
        (lambda: Joined((UP,), "x"), TypeError, "boundaries must be a list"),
    ],
)
def test_bad_arguments_are_named(make: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()  # type: ignore[operator]


def test_as_many_repeats_as_there_is_room_for() -> None:
    schedule = WSD(warmup_steps=1, stable_steps=1, decay_steps=1, peak_lr=1.0).repeat(MAX_SEGMENTS // 3 - 1)
    assert len(schedule.layers()[0].segments) == (MAX_SEGMENTS // 3 - 1) * 3 + 1
