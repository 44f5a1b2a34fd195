"""What every schedule can do besides its formula: lists of values, plain-type dicts, scaling."""

from __future__ import annotations

import functools
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from nexus.arguments import check_count, check_number, refuse_unnamed, shown
from nexus.schedules.curves import NEVER, Curve, Layer, Segment, value_of

if TYPE_CHECKING:
    from nexus.schedules.clock import Clock, Clocked
    from nexus.schedules.compose import Cooldown, Fold, Joined, Repeated, Warmup
    from nexus.schedules.sampled import Sampled

_Self = TypeVar("_Self", bound="Schedule")
T = TypeVar("T")

MAX_DEPTH = 64  # so that what visits all parts, as repr, to_dict, copy and pickle, keeps to Python's stack
TOO_DEEP = (
    f"schedules within schedules more than {MAX_DEPTH} deep; a warmup of more steps, a cooldown, repeat(n), and "
    "join([...], [...]) of any number of parts each take one level"
)


@dataclass(frozen=True)  # without slots: LambdaLR saves a callable's __dict__
class Schedule(ABC):
    """A learning rate as a function of the number of completed updates. Immutable, hashable, comparable.

    `schedule(step)` is the rate, `0.1 * schedule` the same schedule with its rates multiplied; `s * t` and `s + t`
    multiply and add two schedules at each step. A bad argument raises TypeError or ValueError that names the
    argument, what was given and what is allowed.
    """

    _rates: ClassVar[tuple[str, ...]] = ()  # the fields that a factor multiplies
    _later: ClassVar[tuple[str, ...]] = ()  # fields that dicts of earlier versions lack
    _types: ClassVar[dict[str, type[Schedule]]] = {}
    _ratios: ClassVar[str] = ""  # in an error, what takes a ratio in the place of a count
    is_outermost: ClassVar[bool] = False  # whether it can be a part of no other schedule
    _depth: ClassVar[int] = 0  # of the schedules within schedules
    __array_ufunc__ = None  # so that numpy scalars leave `factor * schedule` to __rmul__

    def __init_subclass__(cls) -> None:
        Schedule._types[cls.__name__] = cls

    def __new__(cls: type[_Self], *args: Any, **named: Any) -> _Self:
        refuse_unnamed(cls, args, named)
        return super().__new__(cls)

    def __call__(self, step: int) -> float:
        """The rate that update `step` uses, in float64; `step` is an int from 0 to 2**53."""
        return value_of(layers_of(self), check_count("step", step))

    @staticmethod
    def from_function(fn: Callable[[int], float], steps: int, *, every: int = 1) -> Sampled:
        """Any function of the step, as a table of its rates.

        Args:
            fn: the rate that update `t` uses, `fn(t)`; called once for each step from 0 to `steps`.
            steps: the last step; the rate of that step stays.
            every: the table has the rate of every so many steps, 8 bytes each on the device, and lines between.

        Returns:
            A `Sampled`, with `error` the largest difference to `fn` at any step; 0.0 with `every=1`.

        Raises:
            TypeError, ValueError: `fn` raises, or returns anything but a finite number >= 0 (the step is named), or
                the table would be too long.

        >>> Schedule.from_function(lambda t: 1 / (1 + t), steps=3).values(0, 5)
        [1.0, 0.5, 0.3333333333333333, 0.25, 0.25]
        """
        from nexus.schedules.sampled import sampled_from

        return sampled_from(fn, steps, every)

    @abstractmethod
    def phase(self, step: int) -> str:
        """The name of the phase that update `step` is in."""

    def segments(self) -> tuple[Segment, ...]:
        """The schedule lowered to rows, by ascending start; the first start is 0.

        Raises:
            TypeError: the schedule has more than rows: see `layers`.
        """
        raise TypeError(f"{self!r} is more than one row of segments; layers() has all of it")

    def layers(self) -> tuple[Layer, ...]:
        """The schedule lowered to what the evaluators fold, from left to right."""
        return (Layer(self.segments()),)

    @property
    def length(self) -> int | None:
        """The number of updates after which the rate stays; None where it never does."""
        ends = [_end(layer) for layer in layers_of(self)]
        return None if None in ends else max(end for end in ends if end is not None)

    def own_parts(self) -> list[Schedule]:
        """The schedules that this one is made of."""
        values = (getattr(self, each.name) for each in fields(self))
        parts = (part for value in values for part in (value if isinstance(value, tuple) else (value,)))
        return [part for part in parts if isinstance(part, Schedule)]

    def parts(self) -> Iterator[Schedule]:
        """The schedules that this one is made of, and theirs."""
        for part in self.own_parts():
            yield part
            yield from part.parts()

    def values(self, start: int, stop: int) -> list[float]:
        """The rates of updates `start` to `stop - 1`."""
        start = check_count("start", start)
        stop = check_count("stop", stop, low=start)
        return [self(step) for step in range(start, stop)]

    def plot(self, path: str | os.PathLike[str], steps: int | None = None) -> None:
        """Draw the rates and the phases of the first `steps` updates to a PNG, SVG or PDF: see `nexus.plot.draw`."""
        from nexus.plot import draw

        draw(self, path, steps)

    def to_dict(self) -> dict[str, Any]:
        """The schedule in plain types, for a checkpoint or a JSON file; `from_dict` reads it.

        A field that earlier versions did not have is left out where it has its default. So a checkpoint of one
        version loads in another, also by torch.distributed.checkpoint, which refuses one that lacks an entry.
        """
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        later = self.later_fields(type(self).__name__)
        kept = {name: _plain(value) for name, value in values.items() if name not in later or value != later[name]}
        return {"type": type(self).__name__, **kept}

    @staticmethod
    def from_dict(d: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_dict` wrote.

        Raises:
            ValueError: an unknown type, a missing or an extra field (each is named), or a bad value.

        >>> from nexus.schedules import Constant
        >>> Schedule.from_dict({"type": "Constant", "lr": 0.001})
        Constant(lr=0.001)
        """
        if not isinstance(d, Mapping):
            raise TypeError(f"a schedule must be a dict as to_dict() writes it, got {shown(d)}")
        kind = Schedule._types.get(str(d.get("type")))
        if kind is None:
            given = shown(d["type"]) if "type" in d else "no such key"
            raise ValueError(f"type must be one of {', '.join(Schedule._types)}, got {given}")
        expected = [each.name for each in fields(kind)]
        missing = [name for name in expected if name not in d and name not in kind._later]
        extra = [str(name) for name in d if name != "type" and name not in expected]
        wrong = {"missing": missing, "extra": extra}
        problems = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        if problems:
            raise ValueError(f"{kind.__name__} has the fields {', '.join(expected)}; {problems}")
        try:
            return kind(**{name: restored(d[name]) for name in expected if name in d})
        except RecursionError:
            raise ValueError(f"{kind.__name__} holds {TOO_DEEP}") from None

    @staticmethod
    def later_fields(kind: str) -> dict[str, Any]:
        """The fields, with their values, that dicts which earlier versions wrote of a type lack."""
        found = Schedule._types[kind]
        return {each.name: each.default for each in fields(found) if each.name in found._later}

    def then(self, other: Schedule) -> Joined:
        """This schedule for its length, then another one on a clock of its own: `join([self, other], [length])`.

        Raises:
            ValueError: this schedule has no end.

        >>> from nexus.schedules import Constant, Linear
        >>> Linear(start_lr=0.0, end_lr=1.0, total_steps=2).then(Constant(0.25)).values(0, 4)
        [0.0, 0.5, 0.25, 0.25]
        """
        from nexus.schedules.compose import join, length_of

        return join([self, other], [length_of(self, "then")])

    def repeat(self, n: int | None = None) -> Repeated:
        """This schedule again and again.

        Args:
            n: how many times, after which its last rate stays; None for ever.

        Raises:
            ValueError: this schedule has no end, or `n` repeats of it are too long for a table.

        >>> from nexus.schedules import Linear
        >>> Linear(start_lr=1.0, end_lr=0.0, total_steps=2).repeat(2).values(0, 6)
        [1.0, 0.5, 1.0, 0.5, 0.0, 0.0]
        """
        from nexus.schedules.compose import Repeated

        return Repeated(self, n)

    def warmup(self, steps: int, *, start: float = 0.0, kind: str = "linear", count: str = "t/W") -> Warmup:
        """A rise to this schedule's first rate, and then this schedule, from its step 0 on.

        Args:
            steps: W, the updates of the rise, at least 1.
            start: the rate that the rise begins at, where p = 0.
            kind: `"linear"`, `start + p * (self(0) - start)`; or a decay upside down, `"cosine"` or `"sqrt"`.
            count: what p is at step t: `"t/W"`, `"(t+1)/W"` (the last update of the rise has the first rate of this
                schedule already) or `"(t+1)/(W+1)"` (no update has the rate `start`).

        >>> from nexus.schedules import Constant
        >>> Constant(1.0).warmup(4).values(0, 6)
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
        >>> Constant(1.0).warmup(4, count="(t+1)/W").values(0, 6)
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        """
        from nexus.schedules.compose import Warmup

        return Warmup(self, steps, start, kind, count)

    def cooldown(self, steps: int, *, to: float = 0.0, kind: str = "linear") -> Cooldown:
        """This schedule for its length, then a decay from the rate that it ends with.

        Args:
            steps: the updates of the decay, at least 1.
            to: the rate after it, which stays.
            kind: `"linear"`, `"cosine"` or `"sqrt"`.

        Raises:
            ValueError: this schedule has no end.

        >>> from nexus.schedules import Linear
        >>> Linear(start_lr=0.0, end_lr=1.0, total_steps=2).cooldown(4).values(0, 8)
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
        """
        from nexus.schedules.compose import Cooldown

        return Cooldown(self, steps, to, kind)

    def clip(self, low: float = 0.0, high: float = math.inf) -> Schedule:
        """`minimum(maximum(self, Constant(low)), Constant(high))`, without a bound that does nothing.

        >>> from nexus.schedules import Linear
        >>> Linear(start_lr=0.0, end_lr=1.0, total_steps=4).clip(low=0.25, high=0.5).values(0, 4)
        [0.25, 0.25, 0.5, 0.5]
        """
        from nexus.schedules.compose import clipped

        return clipped(self, low, high)

    def at(self, clock: Clock) -> Clocked:
        """This schedule, evaluated at the count of a clock in place of the completed updates.

        It is the last thing to be done to a schedule: what is at a clock can be part of no other. As a value, it is
        called with the count.

        >>> from nexus.schedules import Clock, Linear
        >>> Linear(start_lr=1.0, end_lr=0.0, total_steps=1_000_000).at(Clock())(750_000)
        0.25
        """
        from nexus.schedules.clock import Clocked

        return Clocked(self, clock)

    def __add__(self, other: Schedule) -> Fold:
        from nexus.schedules.compose import Fold

        return Fold(self, other, "+")

    @overload
    def __mul__(self: _Self, other: float) -> _Self: ...

    @overload
    def __mul__(self, other: Schedule) -> Fold: ...

    def __mul__(self: _Self, other: float | Schedule) -> _Self | Fold:
        if isinstance(other, Schedule):
            from nexus.schedules.compose import Fold

            return Fold(self, other, "*")
        return self.__rmul__(other)

    def __rmul__(self: _Self, factor: float) -> _Self:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"a factor of {self!r} must be a number > 0 or a nexus Schedule, got {shown(factor)}")
        return self._scaled(check_number("factor", factor, positive=True))

    def _scaled(self: _Self, factor: float) -> _Self:
        rates = {name: getattr(self, name) for name in self._rates}
        return replace(self, **{name: factor * rate for name, rate in rates.items() if rate is not None})

    def _set(self, **values: object) -> None:
        for name, value in values.items():  # the instance is frozen: __post_init__ stores what it checked
            object.__setattr__(self, name, value)

    def _check_counts(self, **lowest: int) -> None:
        for name, low in lowest.items():
            self._set(**{name: check_count(name, getattr(self, name), low=low, ratios=self._ratios)})


def once(function: Callable[[Schedule], T]) -> Callable[[Schedule], T]:
    """Remember what a function gives of a schedule, by its identity: tables of a million rates take long to hash."""
    kept: dict[int, tuple[weakref.ref[Schedule], T]] = {}

    @functools.wraps(function)
    def remembered(schedule: Schedule) -> T:
        key = id(schedule)
        found = kept.get(key)
        if found is not None and found[0]() is schedule:
            return found[1]
        result = function(schedule)
        kept[key] = weakref.ref(schedule, lambda _: kept.pop(key, None)), result
        return result

    return remembered


@once
def layers_of(schedule: Schedule) -> tuple[Layer, ...]:
    """The schedule's layers, lowered once."""
    return schedule.layers()


def _end(layer: Layer) -> int | None:
    """From where on the layer is constant."""
    last = layer.segments[-1]
    is_constant = last.curve == Curve.CONSTANT and last.start < NEVER
    return last.start if is_constant and (layer.repeat_start == NEVER or len(layer.segments) == 1) else None


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_dict()
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def restored(value: Any) -> Any:
    """What a field of a dict stands for."""
    if isinstance(value, Mapping):
        return Schedule.from_dict(value)
    return tuple(restored(each) for each in value) if isinstance(value, (list, tuple)) else value
