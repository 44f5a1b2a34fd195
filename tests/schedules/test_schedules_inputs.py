"""Bad arguments of the schedules: each message names the argument, what was given and what is allowed."""

import copy
import math
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from nexus.schedules import (
    MAX_STEP,
    WSD,
    Arc,
    Constant,
    Cosine,
    CosineRestarts,
    Linear,
    Piecewise,
    ReduceOnPlateau,
    Sampled,
    Schedule,
)
from nexus.training.schedulers import WSDScheduler

GOOD = {
    WSD: {"warmup_steps": 10, "stable_steps": 20, "decay_steps": 30, "peak_lr": 1e-3, "min_lr": 1e-5},
    CosineRestarts: {"peak_lr": 1e-3, "min_lr": 1e-5, "cycle_length": 10, "cycle_mult": 1.5, "warmup_steps": 5},
    Cosine: {"peak_lr": 1e-3, "total_steps": 100, "min_lr": 1e-5, "warmup_steps": 5},
    Constant: {"lr": 1e-3},
}
LOWEST_COUNTS = {
    WSD: {"warmup_steps": 0, "stable_steps": 0, "decay_steps": 1},
    CosineRestarts: {"cycle_length": 1, "warmup_steps": 0},
    Cosine: {"total_steps": 1, "warmup_steps": 0},
}
LOWEST_NUMBERS = {"peak_lr": "> 0", "min_lr": ">= 0", "lr": ">= 0", "cycle_mult": ">= 1"}

# What was given, the error, and what the message says was given.
BAD_COUNTS = [
    (MAX_STEP + 1, ValueError, "9007199254740993"),
    (10**5000, ValueError, "a very large int"),
    (1000.0, TypeError, "1000.0"),
    (np.float32(2.5), TypeError, "2.5"),
    (math.nan, TypeError, "nan"),
    (math.inf, TypeError, "inf"),
    (True, TypeError, "True"),
    (np.bool_(True), TypeError, "True"),
    ("10", TypeError, "'10'"),
    ([10], TypeError, "[10]"),
    (torch.ones(2), TypeError, "Tensor"),
]
BAD_STEPS = [*BAD_COUNTS, (-1, ValueError, "-1"), (None, TypeError, "None")]
BAD_NUMBERS = [
    (-1e-3, ValueError, "-0.001"),
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    (-math.inf, ValueError, "-inf"),
    (10**400, ValueError, "1000"),
    (True, TypeError, "True"),
    ("1e-3", TypeError, "'1e-3'"),
    (None, TypeError, "None"),
    (1j, TypeError, "1j"),
    (np.ones(2), TypeError, "array"),
    (torch.tensor(0.1), TypeError, "tensor"),
]


def values_refused(kind, name):
    """What the argument must be, and the values that it must not be."""
    if name in LOWEST_NUMBERS:
        return f"a finite number {LOWEST_NUMBERS[name]}, got ", BAD_NUMBERS
    low = LOWEST_COUNTS[kind][name]
    wrong = [*BAD_COUNTS, (low - 1, ValueError, f"got {low - 1}")]
    if name != "stable_steps":
        wrong.append((None, TypeError, "got None"))
    return f"an int from {low} to 2**53", wrong


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, good in GOOD.items() for name in good])
def test_bad_argument(kind, name) -> None:
    allowed, wrong = values_refused(kind, name)
    for value, error, given in wrong:
        with pytest.raises(error) as caught:
            kind(**GOOD[kind] | {name: value})
        message = str(caught.value)
        assert message.startswith(f"{name} must be {allowed}")
        assert given in message
        assert "\n" not in message


@pytest.mark.parametrize("kind", LOWEST_COUNTS)
def test_the_lowest_counts_are_allowed_and_rates_are_in_order(kind) -> None:
    kind(**GOOD[kind] | LOWEST_COUNTS[kind])
    with pytest.raises(ValueError, match=r"^peak_lr must be a finite number > 0, got 0"):
        kind(**GOOD[kind] | {"peak_lr": 0, "min_lr": 0})
    with pytest.raises(ValueError, match=r"^min_lr must be .*peak_lr=0\.001, got 0\.002$"):
        kind(**GOOD[kind] | {"min_lr": 0.002})
    assert kind(**GOOD[kind] | {"min_lr": 1e-3})(5) == 1e-3
    assert math.copysign(1.0, kind(**GOOD[kind] | {"min_lr": -0.0}).min_lr) == 1.0


RESTARTS = (
    "CosineRestarts takes its arguments by name, as they are easy to swap: CosineRestarts(peak_lr=..., min_lr=0.0, "
    "cycle_length=10000, cycle_mult=1.0, warmup_steps=0, "
)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (CosineRestarts, (1000, 1e-3), RESTARTS),
        (CosineRestarts, (1000, 1e-3), "got 1000, 0.001 without a name"),
        (Cosine, (1e-3,), "Cosine(peak_lr=..., total_steps=..., min_lr=0.0, warmup_steps=0"),
        (Linear, (1.0, 0.0, 5), "Linear(start_lr=..., end_lr=..., total_steps=...), got 1.0, 0.0, 5 without a name"),
        (Sampled, ([1.0], 2), "Sampled(rates, every=1, error=0.0), got 2 without"),
        (Piecewise, ([(0, 1.0)], "linear"), "Piecewise(points, kind='constant')"),
        (Arc, ("cosine", 1.0, 0.0, 5.0), "Arc(curve, high=..., low=..., span=..., shift=0.0, k=1.0, q=1.0)"),
        (ReduceOnPlateau, (Constant(1.0), "max"), "ReduceOnPlateau(schedule, mode='min', "),
        (Constant, (1.0, 2.0), "Constant(lr), got 2.0 without a name"),
    ],
)
def test_arguments_that_are_easy_to_swap_need_their_names(kind, arguments, words) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        kind(*arguments)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: Cosine(peak_lr=1.0, T_max=5),
            "Cosine has no argument 'T_max': Cosine(peak_lr=..., total_steps=..., ",
        ),
        (lambda: Constant(lr=1.0, lr_min=0.5), "Constant has no argument 'lr_min': Constant(lr)"),
        (lambda: WSDScheduler(None, warmup=5), "WSDScheduler has no argument 'warmup': WSDScheduler(optimizer, "),
    ],
    ids=["Cosine", "Constant", "WSDScheduler"],
)
def test_an_argument_that_there_is_not_shows_those_that_there_are(make, words) -> None:
    with pytest.raises(TypeError, match=re.escape(words)):
        make()


def test_a_subclass_may_take_arguments_as_it_likes() -> None:
    @dataclass(frozen=True)
    class Halves(Schedule):
        first: float
        second: float = 0.5

        def phase(self, step: int) -> str:
            return "half"

    class Short(Linear):
        def __init__(self, *rates: float) -> None:
            super().__init__(start_lr=rates[0], end_lr=rates[1], total_steps=2)

    try:
        assert Halves(1.0, 0.25).second == 0.25
        assert Short(1.0, 0.0)(1) == 0.5
        assert copy.deepcopy(Short(1.0, 0.0))(1) == 0.5
        assert pickle.loads(pickle.dumps(SHORT)) == SHORT
    finally:
        del Schedule._types["Halves"], Schedule._types["Short"]


SHORT = WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0)
DECAY_TYPE = r"^decay_type must be one of \('linear', 'cosine', 'sqrt', 'exponential', 'polynomial'\), got "
CYCLE_MULT = "^cycle_mult must be a finite number >= 1, got "
TOO_MANY_CYCLES = r"cycle_mult=.*more than 65,536 .*must be 1\.0 .*at least 1\.0004"
WARMUP = "^warmup_steps must be less than total_steps=100, got "
TYPE = "type must be one of .*WSD.*got "


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        ("WSD(warmup_steps=1000.0, stable_steps=1, decay_steps=1, peak_lr=1.0)", TypeError, r"write int\(1000\.0\)"),
        ("WSD(warmup_steps=1, stable_steps=2.5, decay_steps=1, peak_lr=1.0)", TypeError, "None"),
        (
            "WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, decay_type='exp')",
            ValueError,
            f"{DECAY_TYPE}'exp'",
        ),
        (
            "WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, decay_type='Linear')",
            ValueError,
            f"{DECAY_TYPE}'Linear'",
        ),
        (
            "WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, decay_type=3)",
            TypeError,
            f"{DECAY_TYPE}3",
        ),
        (
            "WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0, decay_type=None)",
            TypeError,
            f"{DECAY_TYPE}None",
        ),
        ("CosineRestarts(peak_lr=1.0, cycle_mult=0.5)", ValueError, f"{CYCLE_MULT}0.5"),
        ("CosineRestarts(peak_lr=1.0, cycle_mult=0)", ValueError, f"{CYCLE_MULT}0"),
        ("CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=1.0001)", ValueError, TOO_MANY_CYCLES),
        ("CosineRestarts(peak_lr=1.0, cycle_length=10_000, cycle_mult=1.0001)", ValueError, TOO_MANY_CYCLES),
        ("CosineRestarts(peak_lr=1.0, cycle_length=1, cycle_mult=1.0000001)", ValueError, TOO_MANY_CYCLES),
        ("CosineRestarts(peak_lr=1.0, cycle_length=10**7, cycle_mult=1.00001)", ValueError, TOO_MANY_CYCLES),
        ("Cosine(peak_lr=1.0, total_steps=100, warmup_steps=100)", ValueError, f"{WARMUP}100"),
        ("Cosine(peak_lr=1.0, total_steps=100, warmup_steps=101)", ValueError, f"{WARMUP}101"),
        ("Constant(1.0).values(-1, 3)", ValueError, "^start must be"),
        ("Constant(1.0).values(5, 4)", ValueError, "^stop must be an int from 5 "),
        ("Constant(1.0).values(0, 4.0)", TypeError, "^stop must be"),
        ("SHORT.extend_stable(-1)", ValueError, "^n must be an int from 0"),
        ("SHORT.extend_stable(1.0)", TypeError, "^n must be an int from 0"),
        ("SHORT.extend_stable(MAX_STEP)", ValueError, "^stable_steps must be"),
        (
            "WSD(warmup_steps=1, stable_steps=None, decay_steps=3, peak_lr=1.0).extend_stable(1)",
            ValueError,
            "stable_steps .*open-ended",
        ),
        ("SHORT.begin_decay(0)", ValueError, "^step=0 .*nothing to decay from"),
        ("Schedule()", TypeError, "abstract"),
        ("Schedule.from_dict([('type', 'WSD')])", TypeError, "must be a dict"),
        ("Schedule.from_dict({'type': 'Constant', 'rate': 1.0})", ValueError, "missing: lr; extra: rate"),
        ("Schedule.from_dict(SHORT.to_dict() | {'type': 'Poly'})", ValueError, f"{TYPE}'Poly'"),
        ("Schedule.from_dict(SHORT.to_dict() | {'type': None})", ValueError, f"{TYPE}None"),
        (
            "Schedule.from_dict(SHORT.to_dict() | {'peak_lrs': 1.0, 'x': 1})",
            ValueError,
            "WSD has the fields warmup_steps, .*; extra: peak_lrs, x$",
        ),
        ("Schedule.from_dict(SHORT.to_dict() | {'peak_lr': math.nan})", ValueError, "peak_lr must be"),
        ("Schedule.from_dict(SHORT.to_dict() | {'decay_type': 'exp'})", ValueError, "decay_type must be"),
    ],
)
def test_refused(expression: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eval(expression)


@pytest.mark.parametrize("missing", SHORT.to_dict())
def test_incomplete_dict(missing: str) -> None:
    rest = SHORT.to_dict()
    del rest[missing]
    expected = "type must be one of .*no such key" if missing == "type" else f"WSD has .*; missing: {missing}$"
    with pytest.raises(ValueError, match=expected):
        Schedule.from_dict(rest)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(("step", "error", "given"), BAD_STEPS, ids=[given for *_, given in BAD_STEPS])
def test_bad_step(kind, step, error, given) -> None:
    schedule = kind(**GOOD[kind])
    calls = [schedule, schedule.phase]
    calls += [schedule.begin_decay] if kind is WSD else []
    calls += [schedule.cycle] if kind is CosineRestarts else []
    for call in calls:
        with pytest.raises(error, match=r"^step must be an int from 0 to 2\*\*53, got ") as caught:
            call(step)
        assert given in str(caught.value)


@pytest.mark.parametrize("kind", GOOD)
def test_bad_factor(kind) -> None:
    schedule = kind(**GOOD[kind])
    out_of_range = [(factor, ValueError) for factor in (0, -1, math.nan, math.inf, np.float64(-1))]
    no_number = [(factor, TypeError) for factor in (True, "2", None, [2], np.ones(3))]
    for factor, error in out_of_range + no_number:
        message = "^factor must be a finite number > 0" if error is ValueError else None
        with pytest.raises(error, match=message):
            factor * schedule
        with pytest.raises(error, match=message):
            schedule * factor
    with pytest.raises(ValueError, match="lr must be a finite number"):
        schedule * 1e308 * 1e308


@pytest.mark.parametrize("kind", GOOD)
def test_immutable(kind) -> None:
    schedule = kind(**GOOD[kind])
    for name in GOOD[kind]:
        with pytest.raises(FrozenInstanceError):
            setattr(schedule, name, 2.0)
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        schedule.peak = 2.0


def test_oracle_does_without_torch() -> None:
    code = (
        "import sys; from nexus.schedules import Cosine; Cosine(peak_lr=1.0, total_steps=3)(2); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_rate_or_a_share_where_a_count_belongs() -> None:
    with pytest.raises(
        TypeError, match=r"total_steps must be an int .*; of a ratio of the run, give int\(0.001 \* t"
    ):
        Cosine(peak_lr=1000, total_steps=1e-3)  # type: ignore[arg-type]
    for name, share in (("warmup_steps", 0.1), ("stable_steps", 0.5), ("decay_steps", 0.25)):
        words = (
            rf"{name} .*give int\({share} \* total_steps\), or write WSD.from_fractions\(total_steps, warmup=\.\.\."
        )
        with pytest.raises(TypeError, match=words):
            replace(SHORT, **{name: share})
    with pytest.raises(TypeError, match=r"steps must be an int .*; write int\(10.0\)"):
        Constant(1.0).warmup(10.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        ("peak_lr", "1e-3", " (YAML reads 1e-3 as one, and 1.0e-3 as a number): write 0.001"),
        ("peak_lr", "0.5", ": write 0.5"),
        ("total_steps", "1_000", ": write 1000"),
        ("total_steps", "1e3", " (YAML reads 1e-3 as one, and 1.0e-3 as a number): write 1000"),
        ("warmup_steps", "10.0", ": write 10"),
        ("warmup_steps", "-5", None),
        ("warmup_steps", "0.5", None),
        ("total_steps", "9007199254740993", None),
        ("peak_lr", "-1e-3", None),
        ("peak_lr", "nan", None),
        ("peak_lr", "fast", None),
    ],
)
def test_a_number_in_a_string_is_to_be_one(name: str, text: str, meant: str | None) -> None:
    remedy = "" if meant is None else re.escape(f"; that is a string{meant}")
    given: dict[str, Any] = {"peak_lr": 1.0, "total_steps": 1000, name: text}
    with pytest.raises(TypeError, match=rf"{name} must be .*, got '{text}' \(str\){remedy}$"):
        Cosine(**given)
