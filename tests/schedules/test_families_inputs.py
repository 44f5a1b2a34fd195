"""The families' bad arguments, plain-type dicts and scaling, and functions that become tables."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from schedule_cases import FAMILIES, assert_equal_to_oracle, boundaries

from nexus.schedules import (
    WSD,
    WSDS,
    CosineRestarts,
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
    Tanh,
)
from nexus.schedules.curves import MAX_SAMPLES, MAX_SEGMENTS

OF_EACH = {type(schedule): schedule for schedule in FAMILIES}
POSITIVE = "must be a finite number > 0, got "
RATE = "must be a finite number >= 0, got "
COUNT = r"must be an int from 1 to 2\*\*53, got "
FRACTION = "must be a number above 0 and at most 1, got "
SHARE = "must be a number from 0 to 1, got "
POINTS = r"^points must be pairs \(step, rate\) by ascending step, the first of step 0"
MILESTONES = "^milestones must be steps in ascending order"


@pytest.mark.parametrize(
    ("kind", "given", "error", "message"),
    [
        (Linear, {"start_lr": -1.0}, ValueError, f"^start_lr {RATE}-1.0"),
        (Linear, {"end_lr": math.nan}, ValueError, f"^end_lr {RATE}nan"),
        (Linear, {"end_lr": "1"}, TypeError, f"^end_lr {RATE}'1'"),
        (Linear, {"total_steps": 0}, ValueError, f"^total_steps {COUNT}0"),
        (Polynomial, {"power": 0.0}, ValueError, f"^power {POSITIVE}0.0"),
        (Polynomial, {"power": True}, TypeError, f"^power {POSITIVE}True"),
        (Polynomial, {"min_lr": 2.0}, ValueError, "^min_lr must be a number from 0 to peak_lr=0.001, got 2.0"),
        (Polynomial, {"total_steps": 1.5}, TypeError, f"^total_steps {COUNT}1.5"),
        (Exponential, {"gamma": 0}, ValueError, f"^gamma {POSITIVE}0"),
        (Exponential, {"every": 0}, ValueError, f"^every {COUNT}0"),
        (Exponential, {"min_lr": 2.0}, ValueError, "^min_lr must be"),
        (StepDecay, {"gamma": -0.5}, ValueError, f"^gamma {POSITIVE}-0.5"),
        (StepDecay, {"every": None}, TypeError, f"^every {COUNT}None"),
        (MultiStep, {"milestones": [2, 1]}, ValueError, rf"{MILESTONES}, got \[2, 1\]"),
        (MultiStep, {"milestones": 3}, TypeError, f"{MILESTONES}, got 3"),
        (MultiStep, {"milestones": "12"}, TypeError, f"{MILESTONES}, got '12'"),
        (MultiStep, {"milestones": [1, 2.0]}, TypeError, r"^milestones\[1\] must be an int from 0 .*got 2.0"),
        (MultiStep, {"milestones": [-1]}, ValueError, r"^milestones\[0\] must be an int from 0 .*got -1"),
        (MultiStep, {"milestones": range(MAX_SEGMENTS)}, ValueError, "fewer than 65,536, got 65,536"),
        (MultiStep, {"gamma": -0.1}, ValueError, f"^gamma {RATE}-0.1"),
        (MultiStep, {"gamma": 1e200}, ValueError, rf"^peak_lr \* gamma\*\*3 {RATE}inf"),
        (InverseSqrt, {"timescale": 0}, ValueError, f"^timescale {POSITIVE}0"),
        (InverseSqrt, {"peak_lr": 0}, ValueError, f"^peak_lr {POSITIVE}0"),
        (Tanh, {"lower": 3.0}, ValueError, "^lower must be less than upper=3.0, got 3.0"),
        (Tanh, {"lower": -math.inf}, ValueError, "^lower must be a finite number, got -inf"),
        (Tanh, {"upper": None}, TypeError, "^upper must be a finite number, got None"),
        (Tanh, {"total_steps": 0}, ValueError, f"^total_steps {COUNT}0"),
        (WSDS, {"decay_steps": 51}, ValueError, "^decay_steps must be from 1 to cycle_length=50, got 51"),
        (WSDS, {"decay_steps": 0}, ValueError, f"^decay_steps {COUNT}0"),
        (WSDS, {"cycles": 0}, ValueError, r"^cycles must be an int from 1 to 32767 or None \(for ever\), got 0"),
        (WSDS, {"cycles": 32768}, ValueError, "^cycles must be an int from 1 to 32767 .*got 32768"),
        (WSDS, {"decay_type": "step"}, ValueError, r"^decay_type must be one of \('linear', .*got 'step'"),
        (WSDS, {"decay_type": 1}, TypeError, "^decay_type must be one of"),
        (WSDS, {"min_lr": 1.0}, ValueError, "^min_lr must be"),
        (OneCycle, {"up_fraction": 1.5}, ValueError, f"^up_fraction {SHARE}1.5"),
        (OneCycle, {"up_fraction": None}, TypeError, f"^up_fraction {SHARE}None"),
        (
            OneCycle,
            {"up_fraction": 0.6},
            ValueError,
            "^up_fraction must be from 0 to 0.5 with three_phase=True",
        ),
        (OneCycle, {"start_factor": -0.1}, ValueError, f"^start_factor {SHARE}-0.1"),
        (OneCycle, {"end_factor": math.nan}, ValueError, f"^end_factor {SHARE}nan"),
        (OneCycle, {"kind": "sqrt"}, ValueError, r"^kind must be one of \('cosine', 'linear'\), got 'sqrt'"),
        (OneCycle, {"three_phase": 1}, TypeError, "^three_phase must be True or False, got 1"),
        (OneCycle, {"total_steps": 0}, ValueError, f"^total_steps {COUNT}0"),
        (Cyclic, {"base_lr": 1.0}, ValueError, "^base_lr must be a number from 0 to peak_lr=0.001, got 1.0"),
        (Cyclic, {"up_steps": 0}, ValueError, f"^up_steps {COUNT}0"),
        (Cyclic, {"down_steps": 0}, ValueError, r"^down_steps must be .* or None \(as up_steps\), got 0"),
        (Cyclic, {"mode": "square"}, ValueError, "^mode must be one of .*got 'square'"),
        (Cyclic, {"gamma": 0.0}, ValueError, f"^gamma {FRACTION}0.0"),
        (Cyclic, {"gamma": 1.5}, ValueError, f"^gamma {FRACTION}1.5"),
        (Piecewise, {"points": []}, ValueError, f"{POINTS}, from 1 to 65,536 of them, got 0"),
        (Piecewise, {"points": 3}, TypeError, f"{POINTS}, got 3"),
        (Piecewise, {"points": [(0, 1.0), 5]}, TypeError, f"{POINTS}, got 5 .int. as point 1"),
        (Piecewise, {"points": [(1, 1.0)]}, ValueError, f"{POINTS}, got step 1 as that of point 0"),
        (Piecewise, {"points": [(0, 1.0), (5, 1.0), (5, 2.0)]}, ValueError, f"{POINTS}, got step 5 .* point 2"),
        (Piecewise, {"points": [(0, -1.0)]}, ValueError, rf"^the rate of points\[0\] {RATE}-1.0"),
        (Piecewise, {"points": [(0.5, 1.0)]}, TypeError, r"^the step of points\[0\] must be an int from 0"),
        (Piecewise, {"kind": "cubic"}, ValueError, r"^kind must be one of \('constant', 'linear', 'cosine'\), got"),
        (Sampled, {"rates": []}, ValueError, "^rates must be from 1 to 1,048,576 numbers, got 0 of them"),
        (Sampled, {"rates": [0.0] * (MAX_SAMPLES + 1)}, ValueError, "^rates must be from 1 to .*got 1,048,577"),
        (Sampled, {"rates": 1.0}, TypeError, "^rates must be a list of numbers, got 1.0"),
        (Sampled, {"rates": [1.0, -1.0]}, ValueError, rf"^rates\[1\] {RATE}-1.0"),
        (Sampled, {"every": 0}, ValueError, f"^every {COUNT}0"),
        (Sampled, {"error": -1.0}, ValueError, f"^error {RATE}-1.0"),
        (
            CosineRestarts,
            {"cycle_decay": 0},
            ValueError,
            f"^cycle_decay {FRACTION}0",
        ),
        (CosineRestarts, {"cycle_decay": 1.5}, ValueError, "^cycle_decay must be .*got 1.5"),
        (CosineRestarts, {"cycle_decay": "1"}, TypeError, "^cycle_decay must be .*got '1'"),
        (
            CosineRestarts,
            {"cycle_mult": math.nextafter(1.0, 2.0)},
            ValueError,
            "cycle_decay=0.7 needs a row for each cycle .*more than 65,536; cycle_mult must be 1.0 .*at least 1.0004",
        ),
    ],
)
def test_bad_arguments(kind: type, given: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {name: getattr(OF_EACH[kind], name) for name in OF_EACH[kind].to_dict() if name != "type"}
    kind(**arguments)
    with pytest.raises(error, match=message):
        kind(**arguments | given)


@pytest.mark.parametrize("power", [0, -1.0, math.inf])
def test_bad_power_of_a_decay(power: float) -> None:
    with pytest.raises(ValueError, match=f"^decay_power {POSITIVE}"):
        WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, decay_type="polynomial", decay_power=power)


@pytest.mark.parametrize("schedule", FAMILIES, ids=repr)
def test_dicts_and_reprs_make_equal_schedules(schedule: Schedule) -> None:
    written = json.loads(json.dumps(schedule.to_dict()))
    for again in (Schedule.from_dict(written), eval(repr(schedule)), pickle.loads(pickle.dumps(schedule))):
        assert again == schedule
        assert hash(again) == hash(schedule)
        assert again.values(0, 200) == schedule.values(0, 200)


def test_dicts_of_before_the_later_fields_load() -> None:
    wsd, restarts = WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0), CosineRestarts(peak_lr=1.0)
    for schedule, later in ((wsd, "decay_power"), (restarts, "cycle_decay")):
        written = schedule.to_dict()
        assert later not in written  # so that earlier versions load it, and it fits their checkpoints
        assert Schedule.from_dict(written) == schedule
        default = getattr(schedule, later)
        assert Schedule.from_dict({**written, later: default}) == schedule
        other = replace(schedule, **{later: default / 2})
        assert other.to_dict() == {**written, later: default / 2}
        assert Schedule.from_dict(other.to_dict()) == other


@pytest.mark.parametrize("schedule", FAMILIES, ids=repr)
@pytest.mark.parametrize("factor", [0.1, 2, np.float32(0.5)])
def test_scaling_multiplies_the_rates(schedule: Schedule, factor: float) -> None:
    scaled = factor * schedule
    assert type(scaled) is type(schedule)
    assert scaled == schedule * factor
    assert scaled.length == schedule.length
    for step in [*range(200), *boundaries(schedule)]:
        assert scaled(step) == pytest.approx(float(factor) * schedule(step), rel=1e-12, abs=1e-18)
        assert scaled.phase(step) == schedule.phase(step)
    assert_equal_to_oracle(scaled, list(range(200)))


@pytest.mark.parametrize("schedule", FAMILIES, ids=repr)
@pytest.mark.parametrize("step", [-1, 1.5, None, "1", 2**53 + 1])
def test_bad_steps(schedule: Schedule, step: object) -> None:
    for call in (schedule, schedule.phase):
        with pytest.raises((TypeError, ValueError), match=r"^step must be an int from 0 to 2\*\*53, got "):
            call(step)


def test_sequences_and_numbers_of_other_libraries_become_plain() -> None:
    steps, rates = np.array([2, 4]), np.array([0.5, 0.25])
    assert MultiStep(peak_lr=1.0, milestones=list(steps), gamma=np.float32(0.5)) == MultiStep(
        peak_lr=1.0, milestones=(2, 4), gamma=0.5
    )
    assert Sampled(list(rates)) == Sampled((0.5, 0.25))
    assert Piecewise([[0, rates[0]], [steps[0], 1]]) == Piecewise(((0, 0.5), (2, 1.0)))
    assert Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=5) == Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=5, down_steps=5)
    assert MultiStep(peak_lr=1.0, milestones=[], gamma=0.5) == MultiStep(peak_lr=1.0, milestones=(), gamma=0.5)
    assert MultiStep(peak_lr=1.0, milestones=[], gamma=0.5).length == 0


def test_a_function_becomes_a_table() -> None:
    def square(t: int) -> float:
        return (t / 10) ** 2

    exact = Schedule.from_function(square, 10)
    assert exact == Sampled([square(t) for t in range(11)])
    assert exact.values(8, 13) == [square(8), square(9), 1.0, 1.0, 1.0]
    coarse = Schedule.from_function(square, 10, every=5)
    assert coarse.rates == (0.0, 0.25, 1.0)
    assert coarse.error == pytest.approx(0.06)  # (t / 10)**2 is below its chords by (t - a)(b - t) / 100
    assert_equal_to_oracle(coarse, list(range(20)))
    uneven = Schedule.from_function(square, 7, every=5)
    assert uneven.rates == (0.0, 0.25, square(7))
    assert uneven.error == max(abs(uneven(t) - square(t)) for t in range(8))
    assert (2 * coarse).error == 2 * coarse.error
    assert Schedule.from_function(lambda t: np.float32(0.5), 0) == Sampled([0.5])


def raising(t: int) -> float:
    return 1 / (3 - t)


@pytest.mark.parametrize(
    ("fn", "steps", "every", "error", "message"),
    [
        (raising, 5, 1, ValueError, "at step 3 it raised ZeroDivisionError"),
        (lambda t: math.nan if t == 2 else 1.0, 5, 1, ValueError, f"^the value of fn at step 2 {RATE}nan"),
        (lambda t: 1e308 * 10**t, 5, 1, ValueError, f"^the value of fn at step 1 {RATE}inf"),
        (lambda t: 1.0 - t, 5, 1, ValueError, f"^the value of fn at step 2 {RATE}-1.0"),
        (lambda t: None, 5, 1, TypeError, f"^the value of fn at step 0 {RATE}None"),
        (lambda t: 1 + 0j, 5, 1, TypeError, "^the value of fn at step 0 "),
        (lambda t: torch.tensor(1.0), 5, 1, TypeError, "^the value of fn at step 0 .*tensor"),
        (1.0, 5, 1, TypeError, "^fn must be a callable that takes a step, got 1.0"),
        (math.sqrt, -1, 1, ValueError, "^steps must be an int from 0"),
        (math.sqrt, 5, 0, ValueError, f"^every {COUNT}0"),
        (math.sqrt, 2**20, 1, ValueError, "^every must be at least 2 for steps=1,048,576, .*1,048,576 rates, got 1"),
    ],
)
def test_bad_functions(fn: object, steps: int, every: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule.from_function(fn, steps, every=every)
