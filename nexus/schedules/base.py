"""What every schedule can do besides its formula: lists of values, plain-type dicts, scaling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from nexus.arguments import check_count, check_number, shown
from nexus.schedules.curves import NEVER, Curve, Layer, Segment, value_of

if TYPE_CHECKING:
    from nexus.schedules.sampled import Sampled

_Self = TypeVar("_Self", bound="Schedule")


@dataclass(frozen=True)  # without slots: LambdaLR saves a callable's __dict__
class Schedule(ABC):
    """A learning rate as a function of the number of completed updates. Immutable, hashable, comparable.

    `schedule(step)` is the rate, `0.1 * schedule` the same schedule with its rates multiplied. A bad argument raises
    TypeError or ValueError that names the argument, what was given and what is allowed.
    """

    _rates: ClassVar[tuple[str, ...]] = ()  # the fields that a factor multiplies
    _later: ClassVar[tuple[str, ...]] = ()  # fields that dicts of earlier versions lack
    _types: ClassVar[dict[str, type[Schedule]]] = {}
    __array_ufunc__ = None  # so that numpy scalars leave `factor * schedule` to __rmul__

    def __init_subclass__(cls) -> None:
        Schedule._types[cls.__name__] = cls

    def __call__(self, step: int) -> float:
        """The rate that update `step` uses, in float64; `step` is an int from 0 to 2**53."""
        return value_of(_layers(self), check_count("step", step))

    @staticmethod
    def from_function(fn: Callable[[int], float], steps: int, every: int = 1) -> Sampled:
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
        ends = [_end(layer) for layer in _layers(self)]
        return None if None in ends else max(end for end in ends if end is not None)

    def values(self, start: int, stop: int) -> list[float]:
        """The rates of updates `start` to `stop - 1`."""
        start = check_count("start", start)
        stop = check_count("stop", stop, low=start)
        return [self(step) for step in range(start, stop)]

    def to_dict(self) -> dict[str, Any]:
        """The schedule in plain types, for a checkpoint or a JSON file; `from_dict` reads it.

        A field that dicts of earlier versions lack is left out where it has its default: so do checkpoints of one
        version fit the other, of torch.distributed.checkpoint too, which loads no entry that is new.
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
        return kind(**{name: _restored(d[name]) for name in expected if name in d})

    @staticmethod
    def later_fields(kind: str) -> dict[str, Any]:
        """The fields, with their values, that dicts which earlier versions wrote of a type lack."""
        found = Schedule._types[kind]
        return {each.name: each.default for each in fields(found) if each.name in found._later}

    def __mul__(self: _Self, factor: float) -> _Self:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        return self._scaled(check_number("factor", factor, positive=True))

    __rmul__ = __mul__

    def _scaled(self: _Self, factor: float) -> _Self:
        return replace(self, **{name: factor * getattr(self, name) for name in self._rates})

    def _set(self, **values: object) -> None:
        for name, value in values.items():  # the instance is frozen: __post_init__ stores what it checked
            object.__setattr__(self, name, value)

    def _check_counts(self, **lowest: int) -> None:
        for name, low in lowest.items():
            self._set(**{name: check_count(name, getattr(self, name), low=low)})


@lru_cache(maxsize=256)
def _layers(schedule: Schedule) -> tuple[Layer, ...]:
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


def _restored(value: Any) -> Any:
    if isinstance(value, Mapping):
        return Schedule.from_dict(value)
    return tuple(_restored(each) for each in value) if isinstance(value, (list, tuple)) else value
