"""The evaluators of the kernels against the oracle, at every boundary and up to step 2**53."""

from __future__ import annotations

import pytest
import torch
from references import BACKENDS
from schedule_cases import CURVES, WHOLE, assert_equal_to_oracle, assert_within_rounding

from nexus import backends
from nexus.schedules import MAX_STEP, WSD, Constant, Cosine, CosineRestarts, Curve, Schedule, Segment, evaluate
from nexus.schedules.curves import DECAYS, WEIGHTS


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
        WSD(10, 50_000, 50_000, 1.0),
        *(WSD(0, 0, 100_000, 1.0, decay_type=decay) for decay in DECAYS),
        CosineRestarts(1e-3, 1e-6, 1000, 1.5, 200),
        CosineRestarts(1e-3, cycle_length=997),
        Cosine(1e-3, 100_000, 1e-5, 2000),
    ],
    ids=repr,
)
def test_a_hundred_thousand_steps(backend: str, schedule: Schedule) -> None:
    oracle = torch.tensor([schedule(step) for step in range(100_001)], dtype=torch.float64)
    assert_within_rounding(evaluate(schedule, torch.arange(100_001), backend=backend), oracle)


every_evaluator = pytest.mark.parametrize("backend", [*BACKENDS, "triton"])


@every_evaluator
def test_every_evaluator_knows_every_curve_by_the_same_number(backend: str) -> None:
    assert list(CURVES) == list(Curve)
    for curve, weight in CURVES.items():
        expected = pytest.approx([weight(step / 64) for step in range(64)], rel=1e-12)
        assert [WEIGHTS[curve](step / 64) for step in range(64)] == expected
        rows = torch.tensor([Segment(curve, 0, 64, 1.0, 0.0)], dtype=torch.float64)
        values = backends.select(backend, [rows.device]).evaluate(rows, torch.arange(64))
        assert values.tolist() == expected


@every_evaluator
def test_an_unknown_curve_is_refused_and_evaluators_make_nan_of_one(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = max(Curve) + 1
    rows = torch.tensor([(unknown, 0, 4, 1.0, 0.0), (Curve.CONSTANT, 8, 1, 0.5, 0.0)], dtype=torch.float64)
    values = backends.select(backend, [rows.device]).evaluate(rows, torch.tensor([0, 3, 8]))
    assert values.isnan().tolist() == [True, True, False]
    monkeypatch.setattr(Constant, "segments", lambda self: (Segment(unknown, 0, 1, self.lr, 0.0),))
    with pytest.raises(ValueError, match=f"unknown curve, {unknown}; it must be one of .*{max(Curve).name}"):
        evaluate(Constant(1.0), torch.tensor(1), backend=backend)


def test_steps_of_any_shape_and_layout_are_evaluated_where_they_are(backend: str) -> None:
    schedule, grid = Cosine(1.0, 30), torch.arange(20).reshape(4, 5)
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
