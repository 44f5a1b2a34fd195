"""What every schedule can do besides its formula: lists of values, plain-type dicts, scaling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar, TypeVar

from nexus.arguments import check_count, check_number, shown
from nexus.schedules.curves import Layer, Segment

_Self = TypeVar("_Self", bound="Schedule")


@dataclass(frozen=True)  # without slots: LambdaLR saves a callable's __dict__
class Schedule(ABC):
    """A learning rate as a function of the number of completed updates. Immutable, hashable, comparable.

    `schedule(step)` is the rate, `0.1 * schedule` the same schedule with its rates multiplied. A bad argument raises
    TypeError or ValueError that names the argument, what was given and what is allowed.
    """

    _rates: ClassVar[tuple[str, ...]] = ()  # the fields that a factor multiplies
    _types: ClassVar[dict[str, type[Schedule]]] = {}
    __array_ufunc__ = None  # so that numpy scalars leave `factor * schedule` to __rmul__

    def __init_subclass__(cls) -> None:
        Schedule._types[cls.__name__] = cls

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The rate that update `step` uses, in float64; `step` is an int from 0 to 2**53."""

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

    def values(self, start: int, stop: int) -> list[float]:
        """The rates of updates `start` to `stop - 1`."""
        start = check_count("start", start)
        stop = check_count("stop", stop, low=start)
        return [self(step) for step in range(start, stop)]

    def to_dict(self) -> dict[str, Any]:
        """The schedule in plain types, for a checkpoint or a JSON file; `from_dict` reads it."""
        return {"type": type(self).__name__, **asdict(self)}

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
        expected = [field.name for field in fields(kind)]
        missing = [name for name in expected if name not in d]
        extra = [str(name) for name in d if name != "type" and name not in expected]
        wrong = {"missing": missing, "extra": extra}
        problems = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
        if problems:
            raise ValueError(f"{kind.__name__} has the fields {', '.join(expected)}; {problems}")
        return kind(**{name: d[name] for name in expected})

    def __mul__(self: _Self, factor: float) -> _Self:
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        factor = check_number("factor", factor, positive=True)
        return replace(self, **{name: factor * getattr(self, name) for name in self._rates})

    __rmul__ = __mul__

    def _set(self, **values: object) -> None:
        for name, value in values.items():  # the instance is frozen: __post_init__ stores what it checked
            object.__setattr__(self, name, value)

    def _check_counts(self, **lowest: int) -> None:
        for name, low in lowest.items():
            self._set(**{name: check_count(name, getattr(self, name), low=low)})
