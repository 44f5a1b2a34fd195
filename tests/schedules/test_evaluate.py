"""The evaluators of the kernels against the oracle, at every boundary and up to step 2**53."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from references import BACKENDS
from schedule_cases import CURVES, FAMILIES, WHOLE, assert_equal_to_oracle, assert_within_rounding

from nexus import backends
from nexus.schedules import (
    MAX_STEP,
    WSD,
    Constant,
    Cosine,
    CosineRestarts,
    Curve,
    Exponential,
    Linear,
    Schedule,
    StepDecay,
    evaluate,
)
from nexus.schedules.curves import (
    FOLDS,
    LARGEST,
    MAX_SAMPLES,
    MAX_SEGMENTS,
    NEVER,
    Layer,
    Op,
    level,
    segment,
    value_of,
)
from nexus.schedules.table import layers_in, lower
from nexus.schedules.wsd import WSD_DECAYS as DECAYS


@dataclass(frozen=True)
class Layered(Schedule):
    """Any layers."""

    of: tuple[Layer, ...]

    def layers(self) -> tuple[Layer, ...]:
        return self.of

    def __call__(self, step: int) -> float:
        return value_of(self.of, step)

    def phase(self, step: int) -> str:
        return "any"


NUMBERS = {
    Curve.COSINE: [(1.0, 1.0), (2.0, 0.5), (0.7, 1.3)],
    Curve.POWER: [(1.0, 1.0), (2.0, 2.0), (0.5, 0.5), (1.0, 3.7), (0.3, 1.0)],
    Curve.EXPONENTIAL: [(0.0, 0.5), (0.0, 1.5), (0.5, 0.5)],
    Curve.STAIRCASE: [(1.0, 0.1), (1.0, 2.0)],
    Curve.INVERSE: [(1.0, 0.5), (1.0, 1.0), (1.0, 0.7)],
    Curve.LOG: [(0.25, 1.0)],
    Curve.TANH: [(-7.0, 3.0), (-1.0, 2.0)],
}


@pytest.mark.parametrize("schedule", WHOLE, ids=repr)
def test_every_step_of_a_run_equals_the_oracle(schedule: Schedule) -> None:
    assert_equal_to_oracle(schedule, list(range(1000)))


def test_the_last_steps_of_ten_million_are_exact() -> None:
    # With the step in float32 the linear decay is 19% off at its end.
    schedule = WSD(warmup_steps=1000, stable_steps=0, decay_steps=10**7, peak_lr=1.0)
    assert_equal_to_oracle(schedule, list(range(10**7, 10**7 + 1001)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        WSD(
            warmup_steps=1000, stable_steps=79_000, decay_steps=20_000, peak_lr=3e-4, min_lr=3e-6, decay_type="cosine"
        ),
        WSD(warmup_steps=10, stable_steps=50_000, decay_steps=50_000, peak_lr=1.0),
        *(
            WSD(warmup_steps=0, stable_steps=0, decay_steps=100_000, peak_lr=1.0, decay_type=decay)
            for decay in DECAYS
        ),
        CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=1000, cycle_mult=1.5, warmup_steps=200),
        CosineRestarts(peak_lr=1e-3, cycle_length=997),
        Cosine(peak_lr=1e-3, total_steps=100_000, min_lr=1e-5, warmup_steps=2000),
    ],
    ids=repr,
)
def test_a_hundred_thousand_steps(backend: str, schedule: Schedule) -> None:
    oracle = torch.tensor([schedule(step) for step in range(100_001)], dtype=torch.float64)
    assert_within_rounding(evaluate(schedule, torch.arange(100_001), backend=backend), oracle)


every_evaluator = pytest.mark.parametrize("backend", [*BACKENDS, "triton"])


@every_evaluator
def test_every_evaluator_knows_every_curve_by_the_same_number(backend: str) -> None:
    assert [*CURVES, Curve.SAMPLED] == list(Curve)
    steps = torch.arange(64)
    for curve, weight in CURVES.items():
        for k, q in NUMBERS.get(curve, [(1.0, 1.0)]):
            first, span = (1.0, 1.0) if curve == Curve.LOG else (0.0, 16.0 if curve == Curve.STAIRCASE else 64.0)
            row = segment(curve, 0, 64, 3.0, 1.0, offset=first, span=span, k=k, q=q)
            expected = [1.0 + 2.0 * weight((step + first) / span, k, q) for step in range(64)]
            assert [value_of([Layer((row,))], step) for step in range(64)] == pytest.approx(expected, rel=1e-12)
            values = evaluate(Layered((Layer((row,)),)), steps, backend=backend)
            assert values.tolist() == pytest.approx(expected, rel=1e-12), (curve, k, q)


@every_evaluator
def test_an_unknown_curve_is_refused_and_evaluators_make_nan_of_one(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = max(Curve) + 1
    table = lower(Layered((Layer((segment(Curve.RISE, 0, 4, 1.0), level(8, 0.5))),)), torch.device("cpu"))
    table[0, 1, 0] = unknown
    values = backends.select(backend, [table.device]).evaluate(table, torch.tensor([0, 3, 8]))
    assert values.isnan().tolist() == [True, True, False]
    monkeypatch.setattr(Constant, "segments", lambda self: (level(0, self.lr)._replace(curve=unknown),))
    with pytest.raises(ValueError, match=f"unknown curve, {unknown}; it must be one of .*{max(Curve).name}"):
        evaluate(Constant(1.0), torch.tensor(1), backend=backend)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Layer((level(0, 1.0),) * (MAX_SEGMENTS + 1)), "Layered has 65,537 rows in a layer; 65,536 are allowed"),
        (
            Layer((level(0, 1.0),), samples=(0.5,) * (MAX_SAMPLES + 1)),
            "Layered has 1,048,577 samples in a layer; 1,048,576 are allowed",
        ),
    ],
    ids=["rows", "samples"],
)
def test_a_layer_that_no_table_has_room_for_is_refused(layer: Layer, words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}$"):
        lower(Layered((layer,)), torch.device("cpu"))


@every_evaluator
def test_samples_are_read_and_joined_by_lines(backend: str) -> None:
    samples = (0.5, 0.25, 1.0, 0.0625, 3.0)
    rows = (
        segment(Curve.SAMPLED, 0, NEVER, 1.0, span=1.0, k=0.0, q=3.0),
        segment(Curve.SAMPLED, 5, NEVER, 1.0, span=4.0, k=2.0, q=3.0),
    )
    layers = (Layer(rows, samples=samples),)
    expected = [0.5, 0.25, 1.0, 1.0, 1.0, 1.0, *(1.0 - 0.9375 * i / 4 for i in (1, 2, 3)), 0.0625]
    expected += [*(0.0625 + 2.9375 * i / 4 for i in (1, 2, 3)), 3.0, 3.0, 3.0]
    assert [value_of(layers, step) for step in range(16)] == expected
    assert evaluate(Layered(layers), torch.arange(16), backend=backend).tolist() == expected


@every_evaluator
@pytest.mark.parametrize("op", [op for op in Op if op != Op.FIRST])
def test_layers_are_folded_from_left_to_right_and_may_repeat(backend: str, op: Op) -> None:
    rise = segment(Curve.RISE, 0, 10, 1.0)
    layers = (
        Layer((rise, level(10, 0.3))),
        Layer((level(0, 0.4), segment(Curve.LINEAR, 3, 4, 0.8, 0.1)), op, repeat_start=2, repeat_length=5),
        Layer((level(0, 1.5), level(20, 0.7)), Op.TIMES),
    )

    def value(step: int) -> float:
        t = step if step < 2 else 2 + (step - 2) % 5
        second = 0.4 if t < 3 else 0.1 + (1.0 - (t - 3) / 4) * 0.7000000000000001
        return FOLDS[op](step / 10 if step < 10 else 0.3, second) * (1.5 if step < 20 else 0.7)

    expected = [value(step) for step in range(40)]
    assert [value_of(layers, step) for step in range(40)] == expected
    assert evaluate(Layered(layers), torch.arange(40), backend=backend).tolist() == expected


@every_evaluator
def test_a_rate_without_bounds_is_the_largest_number_and_its_product_with_0_is_0(backend: str) -> None:
    growth, stairs = Exponential(peak_lr=1.0, gamma=2.0), StepDecay(peak_lr=1.0, gamma=2.0, every=1)
    cases = {
        growth: LARGEST,
        growth * Linear(start_lr=1.0, end_lr=0.0, total_steps=100): 0.0,
        Linear(start_lr=1.0, end_lr=0.0, total_steps=100) * growth: 0.0,
        growth * stairs * Constant(0.0): 0.0,
        growth + stairs: LARGEST,
        (growth + stairs) * Constant(0.0): 0.0,
        growth.clip(high=0.5) * Constant(0.5): 0.25,
    }
    for schedule, rate in cases.items():
        assert [schedule(step) for step in (2000, MAX_STEP)] == [rate, rate]
        assert evaluate(schedule, torch.tensor([2000, MAX_STEP]), backend=backend).tolist() == [rate, rate]


def test_steps_of_any_shape_and_layout_are_evaluated_where_they_are(backend: str) -> None:
    schedule, grid = Cosine(peak_lr=1.0, total_steps=30), torch.arange(20).reshape(4, 5)
    for steps in (grid, grid.t()[::2], grid[1, 2], grid[1, :0], grid[:2, :0]):
        expected = torch.tensor([schedule(step) for step in steps.flatten().tolist()])
        for device in (None, steps.device):
            with torch.device("meta"):  # the default device plays no part
                values = evaluate(schedule, steps, device, backend)
            assert (values.dtype, values.shape, values.device) == (torch.float64, steps.shape, steps.device)
            assert torch.equal(values.flatten().float(), expected)


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


@pytest.mark.parametrize(
    "schedule",
    [*FAMILIES, Linear(start_lr=1.0, end_lr=0.5, total_steps=40).then(FAMILIES[-1]) * FAMILIES[0]],
    ids=repr,
)
def test_layers_read_from_a_table_are_those_that_were_put_there(schedule: Schedule) -> None:
    layers = layers_in(lower(schedule, torch.device("cpu")))
    for step in (*range(130), 999, 1000, 1001, 2**40, 2**53):
        assert value_of(layers, step) == schedule(step)
