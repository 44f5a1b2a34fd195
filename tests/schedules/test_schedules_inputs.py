"""Bad arguments of the schedules: each message names the argument, what was given and what is allowed."""

import math
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from nexus.schedules import MAX_STEP, WSD, Constant, Cosine, CosineRestarts, Schedule
from nexus.schedules.curves import DECAYS

GOOD = {
    WSD: {"warmup_steps": 10, "stable_steps": 20, "decay_steps": 30, "peak_lr": 1e-3, "min_lr": 1e-5},
    CosineRestarts: {"peak_lr": 1e-3, "min_lr": 1e-5, "cycle_length": 10, "warmup_steps": 5},
    Cosine: {"peak_lr": 1e-3, "total_steps": 100, "min_lr": 1e-5, "warmup_steps": 5},
    Constant: {"lr": 1e-3},
}
COUNTS = {
    WSD: {"warmup_steps": 0, "stable_steps": 0, "decay_steps": 1},
    CosineRestarts: {"cycle_length": 1, "warmup_steps": 0},
    Cosine: {"total_steps": 1, "warmup_steps": 0},
    Constant: {},
}
RATES = {WSD: ["peak_lr", "min_lr"], CosineRestarts: ["peak_lr", "min_lr"], Cosine: ["peak_lr", "min_lr"]}
RATES[Constant] = ["lr"]

# What was given, the error, and what the message says was given.
BAD_COUNTS = [
    (-1, ValueError, "-1"),
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
BAD_STEPS = [pytest.param(*bad, id=bad[-1]) for bad in [*BAD_COUNTS, (None, TypeError, "None")]]
BAD_RATES = [
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


def cases(names, bad):
    return [
        pytest.param(kind, name, value, error, given, id=f"{kind.__name__}-{name}-{given}")
        for kind, arguments in names.items()
        for name in arguments
        for value, error, given in bad
    ]


@pytest.mark.parametrize(("kind", "name", "value", "error", "given"), cases(COUNTS, BAD_COUNTS))
def test_bad_count(kind, name, value, error, given) -> None:
    with pytest.raises(error) as caught:
        kind(**GOOD[kind] | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be an int from {COUNTS[kind][name]} to 2**53")
    assert given in message
    assert "\n" not in message


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in COUNTS.items() for n in names])
def test_count_of_nothing(kind, name) -> None:
    smallest = GOOD[kind] | {name: COUNTS[kind][name]}
    if (kind, name) == (Cosine, "total_steps"):
        smallest["warmup_steps"] = 0
    kind(**smallest)
    if COUNTS[kind][name] == 1:
        with pytest.raises(ValueError, match=rf"^{name} must be an int from 1 to 2\*\*53, got 0"):
            kind(**GOOD[kind] | {name: 0})
    if name != "stable_steps":
        with pytest.raises(TypeError, match=rf"^{name} must be an int .*got None"):
            kind(**GOOD[kind] | {name: None})


@pytest.mark.parametrize(("kind", "name", "value", "error", "given"), cases(RATES, BAD_RATES))
def test_bad_rate(kind, name, value, error, given) -> None:
    with pytest.raises(error) as caught:
        kind(**GOOD[kind] | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be a finite number >")
    assert given in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", [WSD, CosineRestarts, Cosine])
def test_rates_in_order(kind) -> None:
    with pytest.raises(ValueError, match=r"^peak_lr must be a finite number > 0, got 0"):
        kind(**GOOD[kind] | {"peak_lr": 0, "min_lr": 0})
    with pytest.raises(ValueError, match=r"^min_lr must be .*peak_lr=0\.001, got 0\.002$"):
        kind(**GOOD[kind] | {"min_lr": 0.002})
    assert kind(**GOOD[kind] | {"min_lr": 1e-3})(5) == 1e-3
    assert math.copysign(1.0, kind(**GOOD[kind] | {"min_lr": -0.0}).min_lr) == 1.0


def test_float_count_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=re.escape("write int(1000.0)")):
        WSD(1000.0, 1, 1, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="None"):
        WSD(1, 2.5, 1, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "error"), [("exp", ValueError), ("Linear", ValueError), (3, TypeError), (None, TypeError)]
)
def test_bad_decay_type(value, error) -> None:
    allowed = re.escape(f"decay_type must be one of {tuple(DECAYS)}, got {value!r}")
    with pytest.raises(error, match=allowed):
        WSD(1, 2, 3, 1.0, decay_type=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(value, ValueError) for value in (0.5, 0, -2, math.nan, math.inf)]
    + [(value, TypeError) for value in ("2", True, None)],
)
def test_bad_cycle_mult(value, error) -> None:
    with pytest.raises(error, match=r"^cycle_mult must be a finite number >= 1, got"):
        CosineRestarts(1.0, cycle_mult=value)


@pytest.mark.parametrize(("length", "mult"), [(1, 1.0001), (10_000, 1.0001), (1, 1.0000001), (10**7, 1.00001)])
def test_cycle_mult_barely_above_one(length, mult) -> None:
    with pytest.raises(ValueError, match=r"cycle_mult=.*more than 65,536 .*must be 1\.0 .*at least 1\.0004"):
        CosineRestarts(1.0, cycle_length=length, cycle_mult=mult)


@pytest.mark.parametrize("warmup", [100, 101])
def test_cosine_needs_steps_after_the_warmup(warmup: int) -> None:
    with pytest.raises(ValueError, match=rf"^warmup_steps must be less than total_steps=100, got {warmup}"):
        Cosine(1.0, 100, warmup_steps=warmup)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize(("step", "error", "given"), BAD_STEPS)
def test_bad_step(kind, step, error, given) -> None:
    schedule = kind(**GOOD[kind])
    calls = [schedule, schedule.phase]
    calls += [schedule.begin_decay] if kind is WSD else []
    calls += [schedule.cycle] if kind is CosineRestarts else []
    for call in calls:
        with pytest.raises(error, match=r"^step must be an int from 0 to 2\*\*53, got ") as caught:
            call(step)
        assert given in str(caught.value)


def test_bad_values_range() -> None:
    schedule = Constant(1.0)
    assert schedule.values(3, 3) == []
    with pytest.raises(ValueError, match=r"^start must be"):
        schedule.values(-1, 3)
    with pytest.raises(ValueError, match=r"^stop must be an int from 5 "):
        schedule.values(5, 4)
    with pytest.raises(TypeError, match=r"^stop must be"):
        schedule.values(0, 4.0)  # type: ignore[arg-type]


def test_bad_extension() -> None:
    with pytest.raises(ValueError, match=r"^n must be an int from 0"):
        WSD(1, 2, 3, 1.0).extend_stable(-1)
    with pytest.raises(TypeError, match=r"^n must be an int from 0"):
        WSD(1, 2, 3, 1.0).extend_stable(1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"stable_steps .*open-ended"):
        WSD(1, None, 3, 1.0).extend_stable(1)
    with pytest.raises(ValueError, match=r"^stable_steps must be"):
        WSD(1, 2, 3, 1.0).extend_stable(MAX_STEP)


@pytest.mark.parametrize("kind", GOOD)
def test_bad_factor(kind) -> None:
    schedule = kind(**GOOD[kind])
    for factor in (0, -1, math.nan, math.inf, np.float64(-1)):
        with pytest.raises(ValueError, match=r"^factor must be a finite number > 0"):
            factor * schedule
        with pytest.raises(ValueError, match=r"^factor must be a finite number > 0"):
            schedule * factor
    for factor in (True, "2", None, [2], np.ones(3), schedule):
        with pytest.raises(TypeError):
            factor * schedule
        with pytest.raises(TypeError):
            schedule * factor
    with pytest.raises(ValueError, match="lr must be a finite number"):
        schedule * 1e308 * 1e308


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "Polynomial"}, r"type must be one of .*WSD.*got 'Polynomial'"),
        ({"type": None}, r"type must be one of .*WSD.*got None"),
        ({"peak_lrs": 1.0, "x": 1}, r"WSD has the fields warmup_steps, .*; extra: peak_lrs, x$"),
        ({"peak_lr": math.nan}, r"peak_lr must be"),
        ({"decay_type": "exp"}, r"decay_type must be"),
    ],
)
def test_bad_dict(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_dict(WSD(1, 2, 3, 1.0).to_dict() | change)


def test_incomplete_dict() -> None:
    written = WSD(1, 2, 3, 1.0).to_dict()
    for name in written:
        rest = {key: value for key, value in written.items() if key != name}
        expected = "type must be one of .*no such key" if name == "type" else f"WSD has .*; missing: {name}$"
        with pytest.raises(ValueError, match=expected):
            Schedule.from_dict(rest)
    with pytest.raises(ValueError, match=r"missing: lr; extra: rate"):
        Schedule.from_dict({"type": "Constant", "rate": 1.0})
    with pytest.raises(TypeError, match="must be a dict"):
        Schedule.from_dict([("type", "WSD")])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", GOOD)
def test_immutable(kind) -> None:
    schedule = kind(**GOOD[kind])
    name = RATES[kind][0]
    with pytest.raises(FrozenInstanceError):
        setattr(schedule, name, 2.0)
    with pytest.raises((FrozenInstanceError, AttributeError, TypeError)):
        schedule.peak = 2.0
    with pytest.raises(TypeError, match="abstract"):
        Schedule()  # type: ignore[abstract]


def test_oracle_does_without_torch() -> None:
    code = "import sys; from nexus.schedules import WSD; WSD(1, 2, 3, 1.0)(2); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
