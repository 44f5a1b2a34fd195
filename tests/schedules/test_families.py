"""Every family of schedules against its closed form, written here anew, and on every evaluator."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import pytest
import torch
from schedule_cases import FAMILIES, assert_equal_to_oracle, assert_within_rounding, boundaries

from nexus.schedules import (
    MAX_STEP,
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
    evaluate,
)
from nexus.schedules.curves import LARGEST

LENGTHS = [1, 2, 10, 113, 1000, 1001]
PEAK, LOW = 1e-3, 1e-5


def down(weight: float) -> float:
    return LOW + weight * (PEAK - LOW)


def half_cosine(p: float) -> float:
    return (1 + math.cos(math.pi * p)) / 2


def one_cycle(t: int, n: int, cosine: bool, three: bool) -> float:
    knots = [(0.0, PEAK / 25), (0.3 * n - 1, PEAK), (n - 1.0, PEAK / 25e4)]
    if three:
        knots.insert(2, (2 * 0.3 * n - 2, PEAK / 25))
    for i in range(1, len(knots)):
        (begin, first), (end, last) = knots[i - 1], knots[i]
        if t <= end or i == len(knots) - 1:
            p = min((t - begin) / (end - begin), 1.0)
            weight = half_cosine(p) if cosine else 1 - p
            return last + weight * (first - last)
    raise AssertionError


def cyclic(t: int, up: int, fall: int, scale: Callable[[int, int], float]) -> float:
    cycle, rest = divmod(t, up + fall)
    height = rest / up if rest <= up else (up + fall - rest) / fall
    return LOW + (PEAK - LOW) * height * scale(cycle, t)


def wsds(t: int, n: int, cycles: float) -> float:
    stable = n - (n + 1) // 2
    if t < 13:
        return down(t / 13)
    if (t - 13) // n >= cycles:
        return LOW
    u = (t - 13) % n
    return PEAK if u < stable else down(1 - (u - stable) / (n - stable))


def piecewise(t: int, n: int, kind: str) -> float:
    knots = [(0, 0.0), (n, PEAK), (3 * n, LOW), (4 * n, LOW)]
    if t >= 4 * n:
        return LOW
    i = bisect_right([step for step, _ in knots], t) - 1
    (begin, first), (end, last) = knots[i], knots[i + 1]
    p = (t - begin) / (end - begin)
    if kind == "constant":
        return first
    return first + (p if kind == "linear" else 1 - half_cosine(p)) * (last - first)


def restarts(t: int, n: int, mult: int) -> float:
    if t < 13:
        return LOW + t / 13 * (PEAK - LOW)
    u, cycle, length = t - 13, 0, n
    while u >= length:
        u, cycle, length = u - length, cycle + 1, length * mult
    return LOW + half_cosine(u / length) * (PEAK * 0.7**cycle - LOW)


RATES = (0.5, 0.25, 1.0, 0.0, 2.0)


def sampled(t: int, n: int) -> float:
    i, p = t // n, t % n / n
    return RATES[-1] if i >= 4 else (1 - p) * RATES[i] + p * RATES[i + 1]


def points(n: int) -> list[tuple[int, float]]:
    return [(0, 0.0), (n, PEAK), (3 * n, LOW), (4 * n, LOW)]


def wsd(t: int, n: int, weight: Callable[[float], float]) -> float:
    return down(t / 13) if t < 13 else PEAK if t < 20 else down(weight((t - 20) / n)) if t < 20 + n else LOW


CLOSED: dict[str, tuple[Callable[[int], Schedule], Callable[[int, int], float]]] = {
    "rise": (lambda n: Linear(start_lr=LOW, end_lr=PEAK, total_steps=n), lambda t, n: down(min(t / n, 1))),
    "fall": (lambda n: Linear(start_lr=PEAK, end_lr=LOW, total_steps=n), lambda t, n: down(1 - min(t / n, 1))),
    "polynomial": (
        lambda n: Polynomial(peak_lr=PEAK, total_steps=n, power=1.7, min_lr=LOW),
        lambda t, n: down((1 - min(t / n, 1)) ** 1.7),
    ),
    "square": (
        lambda n: Polynomial(peak_lr=PEAK, total_steps=n, power=2),
        lambda t, n: PEAK * (1 - min(t / n, 1)) ** 2,
    ),
    "exponential": (
        lambda n: Exponential(peak_lr=PEAK, gamma=0.9, every=n, min_lr=LOW),
        lambda t, n: down(math.exp(math.log(0.9) * t / n)),
    ),
    "growth": (
        lambda n: Exponential(peak_lr=LOW, gamma=1.02, every=n),
        lambda t, n: LOW * math.exp(math.log(1.02) * t / n),
    ),
    "stairs": (lambda n: StepDecay(peak_lr=PEAK, gamma=0.9, every=n, min_lr=LOW), lambda t, n: down(0.9 ** (t // n))),
    "milestones": (
        lambda n: MultiStep(peak_lr=PEAK, milestones=[n, 2 * n, 2 * n, 3 * n], gamma=0.5),
        lambda t, n: PEAK / 2 ** ((t >= n) + 2 * (t >= 2 * n) + (t >= 3 * n)),
    ),
    "inverse": (lambda n: InverseSqrt(peak_lr=PEAK, timescale=n), lambda t, n: PEAK * math.sqrt(n / (n + t))),
    "tanh": (
        lambda n: Tanh(peak_lr=PEAK, total_steps=n, min_lr=LOW, lower=-5, upper=2),
        lambda t, n: down(1 / (1 + math.exp(2 * (-5 + 7 * t / n)))) if t < n else LOW,
    ),
    "one cycle": (lambda n: OneCycle(peak_lr=PEAK, total_steps=n), lambda t, n: one_cycle(t, n, True, False)),
    "one line": (
        lambda n: OneCycle(peak_lr=PEAK, total_steps=n, kind="linear"),
        lambda t, n: one_cycle(t, n, False, False),
    ),
    "three phases": (
        lambda n: OneCycle(peak_lr=PEAK, total_steps=n, three_phase=True),
        lambda t, n: one_cycle(t, n, True, True),
    ),
    "triangles": (
        lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=n, down_steps=7),
        lambda t, n: cyclic(t, n, 7, lambda i, t: 1),
    ),
    "halved": (
        lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=n, mode="triangular2"),
        lambda t, n: cyclic(t, n, n, lambda i, t: 0.5**i),
    ),
    "shrinking": (
        lambda n: Cyclic(base_lr=LOW, peak_lr=PEAK, up_steps=7, down_steps=n, mode="exp_range", gamma=0.99),
        lambda t, n: cyclic(t, 7, n, lambda i, t: 0.99**t),
    ),
    "endless WSDS": (
        lambda n: WSDS(warmup_steps=13, cycle_length=n, decay_steps=(n + 1) // 2, peak_lr=PEAK, min_lr=LOW),
        lambda t, n: wsds(t, n, math.inf),
    ),
    "three WSDS": (
        lambda n: WSDS(warmup_steps=13, cycle_length=n, decay_steps=(n + 1) // 2, peak_lr=PEAK, min_lr=LOW, cycles=3),
        lambda t, n: wsds(t, n, 3),
    ),
    **{
        f"{kind} pieces": (
            lambda n, kind=kind: Piecewise(points(n), kind=kind),
            lambda t, n, kind=kind: piecewise(t, n, kind),
        )
        for kind in ("constant", "linear", "cosine")
    },
    "sampled": (lambda n: Sampled(RATES, every=n), sampled),
    "equal restarts": (
        lambda n: CosineRestarts(
            peak_lr=PEAK, min_lr=LOW, cycle_length=n, cycle_mult=1, warmup_steps=13, cycle_decay=0.7
        ),
        lambda t, n: restarts(t, n, 1),
    ),
    "longer restarts": (
        lambda n: CosineRestarts(
            peak_lr=PEAK, min_lr=LOW, cycle_length=n, cycle_mult=2, warmup_steps=13, cycle_decay=0.7
        ),
        lambda t, n: restarts(t, n, 2),
    ),
    "WSD, exponential": (
        lambda n: WSD(
            warmup_steps=13, stable_steps=7, decay_steps=n, peak_lr=PEAK, min_lr=LOW, decay_type="exponential"
        ),
        lambda t, n: wsd(t, n, lambda p: 2 * 0.5**p - 1),
    ),
    "WSD, polynomial": (
        lambda n: WSD(
            warmup_steps=13,
            stable_steps=7,
            decay_steps=n,
            peak_lr=PEAK,
            min_lr=LOW,
            decay_type="polynomial",
            decay_power=1.5,
        ),
        lambda t, n: wsd(t, n, lambda p: (1 - p) ** 1.5),
    ),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CLOSED)
def test_every_step_equals_the_closed_form(name: str, length: int) -> None:
    make, closed = CLOSED[name]
    schedule = make(length)
    steps = range(4 * length + 60)
    expected = [closed(step, length) for step in steps]
    assert [schedule(step) for step in steps] == pytest.approx(expected, rel=1e-12, abs=1e-18)
    far = [step for step in boundaries(schedule) if schedule(step) < LARGEST]  # but of growth without end
    assert_equal_to_oracle(schedule, [*steps, *far])


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CLOSED)
def test_the_rate_stays_after_the_length_alone(name: str, length: int) -> None:
    schedule = CLOSED[name][0](length)
    end = schedule.length
    endless = ("exponential", "growth", "stairs", "inverse", "triangles", "halved", "shrinking", "endless WSDS")
    assert (end is None) == (name in endless or name.endswith("restarts"))
    if end is not None:
        last = schedule(end)
        assert {schedule(step) for step in (end + 1, end + 2, end + 1000, MAX_STEP)} == {last}
        assert schedule.phase(end) in ("done", "stage 4")
        assert end == 0 or schedule.phase(end - 1) != schedule.phase(end)


@pytest.mark.parametrize("schedule", FAMILIES, ids=repr)
def test_triton_equals_the_oracle(schedule: Schedule) -> None:
    steps = [*range(300), *boundaries(schedule)]
    oracle = torch.tensor([schedule(step) for step in steps], dtype=torch.float64)
    assert_within_rounding(evaluate(schedule, torch.tensor(steps), backend="triton"), oracle)


@pytest.mark.parametrize("schedule", FAMILIES, ids=repr)
def test_boundaries_far_out_are_exact_on_every_evaluator(schedule: Schedule) -> None:
    edges = {2**k for k in (20, 24, 31, 32, 40, 52, 53)}
    near = {edge + offset for edge in edges for offset in (-2, -1, 0, 1, 2)}
    assert_equal_to_oracle(schedule, sorted(step for step in near if step <= MAX_STEP))


def test_far_out_is_where_integers_have_it() -> None:
    def rates(schedule: Schedule, *steps: int) -> list[float]:
        return [schedule(step) for step in steps]

    assert StepDecay(peak_lr=1.0, gamma=0.5, every=2**50)(3 * 2**50 - 1) == 0.25
    assert StepDecay(peak_lr=1.0, gamma=0.5, every=2**50)(3 * 2**50) == 0.125
    assert Linear(start_lr=1.0, end_lr=0.0, total_steps=MAX_STEP)(MAX_STEP - 1) == 2**-53
    assert rates(Linear(start_lr=0.0, end_lr=1.0, total_steps=MAX_STEP), MAX_STEP - 1, MAX_STEP) == [1 - 2**-53, 1.0]
    assert rates(
        MultiStep(peak_lr=1.0, milestones=[MAX_STEP - 1, MAX_STEP], gamma=0.5), MAX_STEP - 2, MAX_STEP - 1, MAX_STEP
    ) == [
        1.0,
        0.5,
        0.25,
    ]
    assert rates(Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=2**52), 2**52, 2**52 + 1) == [1.0, 1 - 2**-52]
    assert CosineRestarts(peak_lr=1.0, cycle_length=2**52, cycle_decay=0.5)(MAX_STEP) == 0.25
    assert rates(
        WSDS(warmup_steps=0, cycle_length=2**52, decay_steps=1, peak_lr=1.0), 2**52 - 2, 2**52 - 1, 2**52
    ) == [1.0, 1.0, 1.0]
    assert rates(Piecewise([(0, 1.0), (MAX_STEP, 0.5)]), MAX_STEP - 1, MAX_STEP) == [1.0, 0.5]


@pytest.mark.parametrize("kind", [Exponential, StepDecay])
def test_growth_goes_to_the_largest_number_and_never_to_nan(kind: type[Exponential] | type[StepDecay]) -> None:
    assert kind(peak_lr=1.0, gamma=2.0, every=1)(MAX_STEP) == LARGEST
    assert kind(peak_lr=1.0, gamma=2.0, every=1, min_lr=1.0)(MAX_STEP) == 1.0
    assert kind(peak_lr=1.0, gamma=2.0, every=1, min_lr=0.5).values(0, 3) == [1.0, 1.5, 2.5]


def test_phases() -> None:
    def phases(schedule: Schedule, *steps: int) -> list[str]:
        return [schedule.phase(step) for step in steps]

    assert phases(Linear(start_lr=0.0, end_lr=1.0, total_steps=4), 0, 3, 4) == ["linear", "linear", "done"]
    assert phases(Polynomial(peak_lr=1.0, total_steps=4), 0, 3, 4) == ["polynomial", "polynomial", "done"]
    assert phases(Tanh(peak_lr=1.0, total_steps=4), 0, 3, 4) == ["tanh", "tanh", "done"]
    assert phases(Exponential(peak_lr=1.0, gamma=0.5), 0, 9) == ["exponential"] * 2
    assert phases(StepDecay(peak_lr=1.0, gamma=0.5, every=2), 0, 9) == ["stairs"] * 2
    assert phases(InverseSqrt(peak_lr=1.0, timescale=2), 0, 9) == ["inverse"] * 2
    assert phases(MultiStep(peak_lr=1.0, milestones=[2, 2, 3], gamma=0.5), 1, 2, 3) == [
        "stage 0",
        "stage 2",
        "stage 3",
    ]
    assert phases(OneCycle(peak_lr=1.0, total_steps=10), 0, 2, 3, 8, 9) == ["up", "up", "down", "down", "done"]
    three = OneCycle(peak_lr=1.0, total_steps=10, three_phase=True)
    assert phases(three, 0, 2, 3, 4, 5, 8, 9) == ["up", "up", "down", "down", "annihilation", "annihilation", "done"]
    assert phases(Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=2, down_steps=3), 0, 1, 2, 4, 5, 7) == [
        "up",
        "up",
        "down",
        "down",
        "up",
        "down",
    ]
    assert phases(Piecewise([(0, 1.0), (2, 0.5), (4, 0.1)]), 0, 2, 4) == ["piece 0", "piece 1", "done"]
    assert phases(Sampled([1.0, 0.5], every=3), 0, 2, 3) == ["sampled", "sampled", "done"]
    cycles = WSDS(warmup_steps=1, cycle_length=3, decay_steps=1, peak_lr=1.0, cycles=2)
    assert phases(cycles, *range(8)) == ["warmup", *["stable", "stable", "decay"] * 2, "done"]
