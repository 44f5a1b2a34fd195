"""The evaluators of the kernels against the oracle, at every boundary and up to step 2**53."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nexus.schedules import MAX_STEP, WSD, Constant, Cosine, CosineRestarts, Schedule, evaluate

COUNTS = st.one_of(st.integers(0, 50), st.integers(0, 10**6), st.integers(0, MAX_STEP))
LENGTHS = st.one_of(st.integers(1, 50), st.integers(1, 10**6), st.integers(1, MAX_STEP))
PEAKS = st.floats(1e-8, 10.0)
SHARES = st.one_of(st.just(0.0), st.just(1.0), st.floats(0.0, 1.0))  # of the peak: the minimum


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    peak = draw(PEAKS)
    low = min(peak, peak * draw(SHARES))
    kind = draw(st.sampled_from([WSD, CosineRestarts, Cosine, Constant]))
    if kind is WSD:
        stable = draw(st.one_of(st.none(), COUNTS))
        curve = draw(st.sampled_from(["linear", "cosine", "sqrt"]))
        return WSD(draw(COUNTS), stable, draw(LENGTHS), peak, low, curve)
    if kind is CosineRestarts:
        mult = draw(st.sampled_from([1.0, 1.1, 1.5, 2.0, 3.0]))
        return CosineRestarts(peak, low, draw(LENGTHS), mult, draw(COUNTS))
    if kind is Cosine:
        total = draw(LENGTHS)
        return Cosine(peak, total, low, draw(st.integers(0, total - 1)))
    return Constant(peak)


def boundaries(schedule: Schedule) -> list[int]:
    """The first and last steps of every phase and cycle, their neighbours, and where narrow types overflow."""
    edges = {0, 2**24, 2**31, 2**32, MAX_STEP}
    for segment in schedule.segments()[:80]:
        edges |= {segment.start, segment.start + segment.length // 2, segment.start + segment.length}
    near = {edge + offset for edge in edges for offset in (-1, 0, 1)}
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


@settings(max_examples=300, deadline=None)
@given(schedules(), st.lists(st.integers(0, MAX_STEP), max_size=20))
@example(WSD(0, 0, 1, 1.0), [])
@example(WSD(0, None, 1, 1.0), [])
@example(WSD(1, 0, 1, 1.0, 1.0), [])
@example(CosineRestarts(1.0, cycle_length=1, cycle_mult=1.0), [])
@example(CosineRestarts(1.0, cycle_length=1, cycle_mult=3.0), [121])  # pytorch's goes astray there
@example(CosineRestarts(1.0, cycle_length=10, cycle_mult=1.1), [10**8, 10**8 + 1])
@example(Cosine(1.0, 1), [])
def test_evaluators_equal_the_oracle(schedule: Schedule, steps: list[int]) -> None:
    assert_equal_to_oracle(schedule, boundaries(schedule) + steps)


WHOLE = [
    WSD(100, 300, 200, 1e-3, 1e-5),
    WSD(100, 300, 200, 1e-3, 1e-5, "cosine"),
    WSD(100, 300, 200, 1e-3, 1e-5, "sqrt"),
    WSD(0, 0, 1000, 1e-3),
    CosineRestarts(1e-3, 1e-6, 100, 1.0, 50),
    CosineRestarts(1e-3, 1e-6, 50, 1.1, 50),
    CosineRestarts(1e-3, 1e-6, 50, 2.0),
    CosineRestarts(1e-3, 1e-6, 1, 3.0),
    Cosine(1e-3, 900, 1e-5, 100),
    Constant(0.1),
]


@pytest.mark.parametrize("schedule", WHOLE, ids=repr)
def test_every_step_of_a_run_equals_the_oracle(schedule: Schedule) -> None:
    assert_equal_to_oracle(schedule, list(range(1000)))


def test_the_last_steps_of_ten_million_are_exact() -> None:
    # With the step in float32 the linear decay is 19% off at its end.
    schedule = WSD(1000, 0, 10**7, 1.0)
    assert_equal_to_oracle(schedule, list(range(10**7, 10**7 + 1001)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        WSD(1000, 79_000, 20_000, 3e-4, 3e-6, "cosine"),
        WSD(10, 50_000, 50_000, 1.0, decay_type="linear"),
        WSD(0, 0, 100_000, 1.0, decay_type="sqrt"),
        CosineRestarts(1e-3, 1e-6, 1000, 1.5, 200),
        CosineRestarts(1e-3, cycle_length=997),
        Cosine(1e-3, 100_000, 1e-5, 2000),
    ],
    ids=repr,
)
def test_a_hundred_thousand_steps(backend: str, schedule: Schedule) -> None:
    oracle = torch.tensor([schedule(step) for step in range(100_001)], dtype=torch.float64)
    assert_within_rounding(evaluate(schedule, torch.arange(100_001), backend=backend), oracle)


# The interface.


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 0)])
def test_the_result_has_the_shape_of_the_steps(backend: str, shape: tuple[int, ...]) -> None:
    steps = torch.ones(shape, dtype=torch.int64)
    values = evaluate(Cosine(1.0, 10), steps, backend=backend)
    assert values.dtype == torch.float64
    assert values.shape == steps.shape
    assert (values == Cosine(1.0, 10)(1)).all()


def test_steps_of_any_layout(backend: str) -> None:
    steps = torch.arange(20).reshape(4, 5).t()[::2]
    expected = [[Cosine(1.0, 30)(step) for step in row] for row in steps.tolist()]
    assert evaluate(Cosine(1.0, 30), steps, device=steps.device, backend=backend).float().tolist() == (
        torch.tensor(expected).tolist()
    )


def test_the_default_device_plays_no_part(backend: str) -> None:
    steps = torch.arange(5)
    with torch.device("meta"):
        values = evaluate(Cosine(1.0, 30), steps, backend=backend)
    assert values.device == steps.device
    assert float(values[0]) == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1.0, torch.tensor(1)), TypeError, "schedule must be a nexus Schedule, got float"),
        ((Constant(1.0), 1), TypeError, "steps must be a tensor of int64, got int"),
        ((Constant(1.0), torch.tensor(1.0)), TypeError, "steps must be a tensor of int64, got torch.float32"),
        ((Constant(1.0), torch.tensor(1, dtype=torch.int32)), TypeError, "got torch.int32"),
        ((Constant(1.0), torch.tensor([0, -1])), ValueError, "from 0 to 2\\*\\*53, got -1 to 0"),
        ((Constant(1.0), torch.tensor([MAX_STEP + 1])), ValueError, "from 0 to 2\\*\\*53"),
        ((Constant(1.0), torch.tensor(1), None, "gpu"), ValueError, "backend must be one of .*'native'.*got 'gpu'"),
        ((Constant(1.0), torch.tensor(1), None, "cuda"), ValueError, "'cuda' runs on cuda, but .* are on cpu"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[object, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        evaluate(*arguments)
