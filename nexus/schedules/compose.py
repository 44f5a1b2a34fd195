"""Schedules made of schedules: one after the other, again and again, or folded by an operation.

Each is a value as its parts are. Calling it evaluates the parts one by one; `layers()` is the same, lowered.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from nexus.arguments import MAX_STEP, call_of, check_choice, check_count, check_number, shown
from nexus.schedules.base import MAX_DEPTH, TOO_DEEP, Schedule, layers_of
from nexus.schedules.clock import Clocked
from nexus.schedules.constant import Constant
from nexus.schedules.curves import DECAYS, FOLDS, MAX_LAYERS, Curve, Layer, Op, Segment, level, segment, value_of
from nexus.schedules.splice import endless, spliced

_S = TypeVar("_S", bound=Schedule)

OPERATIONS = {"*": Op.TIMES, "+": Op.PLUS, "minimum": Op.MIN, "maximum": Op.MAX}
COUNTS = ("t/W", "(t+1)/W", "(t+1)/(W+1)")


@dataclass(frozen=True, repr=False)
class Joined(Schedule):
    """Schedules one after the other, each on its own clock: see `join`."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("schedules", "boundaries"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or isinstance(given, str):
                raise TypeError(f"{name} must be a list, got {shown(given)}")
        if not self.schedules:
            raise ValueError("schedules must be at least one schedule, got none")
        if len(self.boundaries) != len(self.schedules) - 1:
            given, count = len(self.boundaries), len(self.schedules)
            raise ValueError(f"boundaries must be one less than the schedules: {count - 1} for {count}, got {given}")
        checked = tuple(check_count(f"boundaries[{i}]", each) for i, each in enumerate(self.boundaries))
        for i, (before, after) in enumerate(pairwise(checked)):
            if after < before:
                raise ValueError(f"boundaries must ascend, but boundaries[{i + 1}]={after} is below {before}")
        parts = tuple(checked_part(f"schedules[{i}]", each) for i, each in enumerate(self.schedules))
        self._set(schedules=parts, boundaries=checked)
        check_whole(self)

    def __call__(self, step: int) -> float:
        schedule, own = self._at(step)
        return schedule(own)

    def phase(self, step: int) -> str:
        """The phase of the part in force."""
        schedule, own = self._at(step)
        return schedule.phase(own)

    def layers(self) -> tuple[Layer, ...]:
        """The rows of all parts, each cut where the next part begins."""
        return spliced([layers_of(each) for each in self.schedules], self.boundaries)

    @property
    def length(self) -> int | None:
        """Where the last part's rate stays; None where it never does."""
        return _sum(self.boundaries[-1] if self.boundaries else 0, self.schedules[-1].length)

    def _at(self, step: int) -> tuple[Schedule, int]:
        """The part in force, and the step on its clock."""
        step = check_count("step", step)
        i = bisect_right(self.boundaries, step)
        return self.schedules[i], step - (self.boundaries[i - 1] if i else 0)

    def _scaled(self, factor: float) -> Joined:
        return replace(self, schedules=tuple(factor * each for each in self.schedules))

    def __repr__(self) -> str:
        return f"join({list(self.schedules)!r}, {list(self.boundaries)!r})"


@dataclass(frozen=True, repr=False)
class Repeated(Schedule):
    """A schedule again and again: see `Schedule.repeat`."""

    schedule: Schedule
    n: int | None = None

    def __post_init__(self) -> None:
        length = length_of(checked_part("schedule", self.schedule), "repeat")
        if self.n is not None:
            self._set(n=check_count("n", self.n, low=1, high=MAX_STEP // length, also="None (for ever)"))
        check_whole(self)

    def __call__(self, step: int) -> float:
        return self.schedule(self._own(step))

    def phase(self, step: int) -> str:
        """The phase of the schedule that repeats, in its repeat."""
        return self.schedule.phase(self._own(step))

    def layers(self) -> tuple[Layer, ...]:
        """Layers that repeat; of `n` repeats, a row for each where a row's period does not repeat by itself."""
        once = layers_of(self.schedule)
        again = endless(once, self._once)
        return again if self.n is None else spliced([again, once], [(self.n - 1) * self._once])

    @property
    def length(self) -> int | None:
        """The updates of all repeats; None where they never end."""
        return None if self.n is None else self.n * self._once

    @property
    def _once(self) -> int:
        return length_of(self.schedule, "repeat")

    def _own(self, step: int) -> int:
        """The step in the repeat that `step` is in."""
        step = check_count("step", step)
        if self.n is None:
            return step % self._once
        return step - min(step // self._once, self.n - 1) * self._once

    def _scaled(self, factor: float) -> Repeated:
        return replace(self, schedule=factor * self.schedule)

    def __repr__(self) -> str:
        return f"{_operand(self.schedule)}.repeat({'' if self.n is None else self.n})"


@dataclass(frozen=True, repr=False)
class Warmup(Schedule):
    """A rise before a schedule: see `Schedule.warmup`."""

    schedule: Schedule
    steps: int
    start: float = 0.0
    kind: str = "linear"
    count: str = "t/W"

    def __post_init__(self) -> None:
        checked_part("schedule", self.schedule)
        self._check_counts(steps=1)
        self._set(start=check_number("start", self.start), kind=check_choice("kind", self.kind, DECAYS))
        self._set(count=check_choice("count", self.count, COUNTS))
        check_whole(self)

    def __call__(self, step: int) -> float:
        step = check_count("step", step)
        return value_of((self._rise(),), step) if step < self.steps else self.schedule(step - self.steps)

    def phase(self, step: int) -> str:
        """`"warmup"`, and then the phases of the schedule."""
        step = check_count("step", step)
        return "warmup" if step < self.steps else self.schedule.phase(step - self.steps)

    def layers(self) -> tuple[Layer, ...]:
        """A row of the rise before the rows of the schedule."""
        return spliced([(self._rise(),), layers_of(self.schedule)], [self.steps])

    @property
    def length(self) -> int | None:
        """The updates of the rise and of the schedule."""
        return _sum(self.steps, self.schedule.length)

    def _rise(self) -> Layer:
        top = self.schedule(0)
        span = float(self.steps + (self.count == "(t+1)/(W+1)"))
        offset = float(self.count != "t/W")
        # A straight rise is start + p (top - start). The others are a decay upside down.
        curve, high, low = (
            (Curve.RISE, top, self.start) if self.kind == "linear" else (DECAYS[self.kind], self.start, top)
        )
        return Layer((segment(curve, 0, self.steps, high, low, offset=offset, span=span),))

    def _scaled(self, factor: float) -> Warmup:
        return replace(self, schedule=factor * self.schedule, start=factor * self.start)

    def __repr__(self) -> str:
        return f"{_operand(self.schedule)}.warmup({self.steps}{_given(self, start=0.0, kind='linear', count='t/W')})"


@dataclass(frozen=True, repr=False)
class Cooldown(Schedule):
    """A decay after a schedule: see `Schedule.cooldown`."""

    schedule: Schedule
    steps: int
    to: float = 0.0
    kind: str = "linear"

    def __post_init__(self) -> None:
        length_of(checked_part("schedule", self.schedule), "cooldown")
        self._check_counts(steps=1)
        self._set(to=check_number("to", self.to), kind=check_choice("kind", self.kind, DECAYS))
        check_whole(self)

    def __call__(self, step: int) -> float:
        step = check_count("step", step)
        return self.schedule(step) if step < self._begin else value_of((Layer(self._decay()),), step - self._begin)

    def phase(self, step: int) -> str:
        """The phases of the schedule, then `"cooldown"` and `"done"`."""
        step = check_count("step", step)
        if step < self._begin:
            return self.schedule.phase(step)
        return "cooldown" if step < self._begin + self.steps else "done"

    def layers(self) -> tuple[Layer, ...]:
        """The rows of the schedule, a row of the decay, and a level."""
        return spliced([layers_of(self.schedule), (Layer(self._decay()),)], [self._begin])

    @property
    def length(self) -> int | None:
        """The updates of the schedule and of the decay."""
        return _sum(self._begin, self.steps)

    @property
    def _begin(self) -> int:
        return length_of(self.schedule, "cooldown")

    def _decay(self) -> tuple[Segment, ...]:
        high = self.schedule(self._begin)
        return segment(DECAYS[self.kind], 0, self.steps, high, self.to), level(self.steps, self.to)

    def _scaled(self, factor: float) -> Cooldown:
        return replace(self, schedule=factor * self.schedule, to=factor * self.to)

    def __repr__(self) -> str:
        return f"{_operand(self.schedule)}.cooldown({self.steps}{_given(self, to=0.0, kind='linear')})"


@dataclass(frozen=True, repr=False)
class Fold(Schedule):
    """Two schedules at the same step, and an operation: `left * right`, `left + right`, `minimum`, `maximum`."""

    left: Schedule
    right: Schedule
    op: str

    def __post_init__(self) -> None:
        self._set(op=check_choice("op", self.op, OPERATIONS))
        counts = [len(layers_of(checked_part(name, getattr(self, name)))) for name in ("left", "right")]
        if min(counts) > 1:
            raise ValueError(
                f"{self.op} takes at most one operand of several layers, as they are folded from left to right, got "
                f"operands of {counts[0]} and {counts[1]} layers; fold the parts of the second one in one by one"
            )
        if sum(counts) > MAX_LAYERS:
            raise ValueError(f"{self!r} has {sum(counts)} layers; {MAX_LAYERS} are allowed; use fewer operations")
        check_whole(self)

    def __call__(self, step: int) -> float:
        return FOLDS[OPERATIONS[self.op]](self.left(step), self.right(step))

    def phase(self, step: int) -> str:
        """The phase of the left operand."""
        return self.left.phase(step)

    def layers(self) -> tuple[Layer, ...]:
        """The layers of the operand that has more, then the other's: swapped, each operation gives the same bits."""
        left, right = layers_of(self.left), layers_of(self.right)
        more, (other,) = (left, right) if len(right) == 1 else (right, left)
        return (*more, other._replace(op=OPERATIONS[self.op]))

    @property
    def length(self) -> int | None:
        """From where on both rates stay; None where one never does."""
        left, right = self.left.length, self.right.length
        return None if left is None or right is None else max(left, right)

    def _scaled(self, factor: float) -> Fold:
        right = self.right if self.op == "*" else factor * self.right
        return replace(self, left=factor * self.left, right=right)

    def __repr__(self) -> str:
        if self.op in ("minimum", "maximum"):
            return f"{self.op}({self.left!r}, {self.right!r})"
        return f"{_operand(self.left)} {self.op} {_operand(self.right)}"


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Joined:
    r"""Schedules one after the other.

    With :math:`b_i` the boundaries: :math:`\eta(t) = \eta_i(t - b_i)` for :math:`b_i \le t < b_{i + 1}`.

    Args:
        schedules: one or more; each runs on its own clock, from step 0 where it begins.
        boundaries: the steps at which the second and later ones begin, ascending.

    Source: `optax.join_schedules` has the same convention.

    >>> from nexus.schedules import Linear
    >>> rise, fall = (Linear(start_lr=a, end_lr=b, total_steps=2) for a, b in ((0.0, 1.0), (0.5, 0.0)))
    >>> join([rise, Constant(0.5), fall], [2, 4]).values(0, 7)
    [0.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.0]
    """
    return Joined(schedules, boundaries)  # type: ignore[arg-type]  # which makes tuples of them


def minimum(left: Schedule, right: Schedule) -> Fold:
    """The smaller of two rates at each step.

    >>> from nexus.schedules import Linear
    >>> minimum(Linear(start_lr=0.0, end_lr=1.0, total_steps=4), Constant(0.5)).values(0, 4)
    [0.0, 0.25, 0.5, 0.5]
    """
    return Fold(left, right, "minimum")


def maximum(left: Schedule, right: Schedule) -> Fold:
    """The larger of two rates at each step.

    >>> from nexus.schedules import Linear
    >>> maximum(Linear(start_lr=1.0, end_lr=0.0, total_steps=4), Constant(0.5)).values(0, 4)
    [1.0, 0.75, 0.5, 0.5]
    """
    return Fold(left, right, "maximum")


def clipped(schedule: _S, low: float, high: float) -> _S | Fold:
    """See `Schedule.clip`."""
    low = check_number("low", low)
    if high != math.inf:
        high = check_number("high", high)
    if low > high:
        raise ValueError(f"low must be at most high={high!r}, got {low!r}")
    raised = schedule if low == 0.0 else maximum(schedule, Constant(low))
    return raised if high == math.inf else minimum(raised, Constant(high))


def length_of(schedule: Schedule, verb: str) -> int:
    """The schedule's length.

    Raises:
        ValueError: it has none, or no updates.
    """
    length = schedule.length  # of a schedule that nests, each look asks all parts
    if not length:
        what = "never stays at one rate" if length is None else "stays at one rate from step 0 on"
        raise ValueError(
            f"{verb} needs a schedule with an end, but {schedule!r} {what}; join([...], [step]) takes any"
        )
    return length


def checked_part(name: str, value: object) -> Schedule:
    """What is to be a part of another schedule.

    Raises:
        TypeError: it is no schedule, or one that is a part of none.
    """
    if not isinstance(value, Schedule):
        raise TypeError(f"{name} must be a nexus Schedule, got {shown(value)}; {_remedy(value)}")
    if isinstance(value, Clocked):
        raise TypeError(f"{name} must be at no clock, got {value!r}; put the whole at its clock: (...).at(clock)")
    if value.is_outermost:
        kind = type(value).__name__
        raise TypeError(
            f"{name} must not be a {kind}, which is the outermost: make {kind}(...) of the composed schedule"
        )
    return value


def _remedy(value: object) -> str:
    if isinstance(value, type) and issubclass(value, Schedule):
        return f"that is a class: write {call_of(value)}"
    if hasattr(value, "get_last_lr"):
        return "from_torch makes one of a torch scheduler"
    return (
        "Schedule.from_function makes one of a function" if callable(value) else "Constant(lr) makes one of a number"
    )


def check_whole(schedule: Schedule) -> None:
    """Raise where a schedule of schedules is too deep, or has too many layers, rows or samples."""
    depth = 1 + max(part._depth for part in schedule.own_parts())
    if depth > MAX_DEPTH:
        raise ValueError(f"a {type(schedule).__name__} would hold {TOO_DEEP}")
    schedule._set(_depth=depth)
    layers_of(schedule)


def _sum(steps: int, length: int | None) -> int | None:
    return None if length is None or steps + length > MAX_STEP else steps + length


def _operand(schedule: Schedule) -> str:
    return f"({schedule!r})" if isinstance(schedule, Fold) and schedule.op in ("*", "+") else repr(schedule)


def _given(schedule: Schedule, **defaults: object) -> str:
    """The arguments of a call that are not their defaults."""
    values = {name: getattr(schedule, name) for name in defaults}
    return "".join(f", {name}={value!r}" for name, value in values.items() if value != defaults[name])
