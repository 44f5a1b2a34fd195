"""Checks of what a user passes in, and the parser of command lines. An error says what was given, what is allowed."""

from __future__ import annotations

import argparse
import functools
import inspect
import io
import math
import numbers
import operator
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn, cast

MAX_STEP = 2**53
"""Largest step or count: the last integer up to which float64 holds every integer exactly."""
LOWEST = -sys.float_info.max
"""The `low` of a number that may have any sign."""


def shown(value: object) -> str:
    """A short text for `value`, for an error message."""
    try:
        return f"{reprlib.repr(value)} ({type(value).__name__})"
    except ValueError:  # an int of more digits than Python is willing to print
        return f"a very large {type(value).__name__}"


def number_in(text: object) -> float | None:
    """The finite number that a string holds, as an int where it is written as one; None of all else."""
    for kind in (int, float):
        try:
            number = kind(text) if isinstance(text, str) else math.inf
        except ValueError:
            continue
        return number if math.isfinite(number) else None
    return None


def in_a_string(value: object, fits: Callable[[float], bool] = math.isfinite, kind: type[float] = float) -> str:
    """What to write in the place of a string, for the end of an error message, if it holds a number that fits."""
    meant = number_in(value)
    if not isinstance(value, str) or meant is None or not fits(meant):
        return ""
    meant = kind(meant)
    why = "" if "." in value or "e" not in value.lower() else " (YAML reads 1e-3 as one, and 1.0e-3 as a number)"
    return f"; that is a string{why}: write {meant!r}"


def check_count(
    name: str, value: object, *, low: int = 0, high: int = MAX_STEP, also: str = "", ratios: str = ""
) -> int:
    """`value` as an int from `low` to `high`; `also` names what else the caller allows, such as `"None"`.

    `ratios` says what takes the ratio that a number below 1 may be.
    """
    top = "2**53" if high == MAX_STEP else str(high)
    allowed = f"an int from {low} to {top}{f' or {also}' if also else ''}"
    remedy = ""
    if not isinstance(value, bool):
        try:
            count = int(operator.index(value))  # type: ignore[arg-type]
        except TypeError:
            if isinstance(value, numbers.Real) and math.isfinite(value):
                if 0.0 < float(value) < 1.0:
                    remedy = f"; of a ratio of the run, give int({value} * total_steps){ratios}"
                elif low <= float(value) <= high and value == math.floor(value):
                    remedy = f"; write int({value})"
        else:
            if not low <= count <= high:
                raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
            return count
    remedy = remedy or in_a_string(value, lambda number: low <= number <= high and number == math.floor(number), int)
    raise TypeError(f"{name} must be {allowed}, got {shown(value)}{remedy}")


def refuse_unnamed(kind: type, arguments: Sequence[object], named: Mapping[str, object]) -> None:
    """Refuse arguments without a name that a class takes by name alone, and names that it does not take.

    The error shows the call as it is to be.

    >>> class Line:
    ...     def __init__(self, *, slope: float, start: float = 0.0) -> None: ...
    >>> refuse_unnamed(Line, [1.0], {})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: Line takes its arguments by name, as they are easy to swap: Line(slope=..., start=0.0), got 1.0 w...
    """
    parameters = _parameters(kind)
    known = {each.name for each in parameters}
    unknown = [name for name in named if name not in known]
    if unknown and all(each.kind is not each.VAR_KEYWORD for each in parameters):
        raise TypeError(f"{kind.__name__} has no argument {unknown[0]!r}: {call_of(kind)}")
    most = sum(each.kind is not each.KEYWORD_ONLY for each in parameters)
    if len(arguments) > most and all(each.kind is not each.VAR_POSITIONAL for each in parameters):
        given = ", ".join(map(reprlib.repr, arguments[most:]))
        raise TypeError(
            f"{kind.__name__} takes its arguments by name, as they are easy to swap: {call_of(kind)}, got {given} "
            "without a name"
        )


def call_of(kind: type) -> str:
    """A call of a class, with the names and the defaults of the arguments that it takes by name."""
    given = []
    for each in _parameters(kind):
        default = "..." if each.default is each.empty else repr(each.default)
        given.append(f"{each.name}={default}" if each.kind is each.KEYWORD_ONLY else each.name)
    return f"{kind.__name__}({', '.join(given)})"


@functools.cache
def _parameters(kind: type) -> tuple[inspect.Parameter, ...]:
    _, *parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    return tuple(parameters)


def as_real(value: object) -> float | None:
    """A real number, of whatever library it is, as one of Python's; None if it is none. Truth values are none."""
    if type(value) is float or type(value) is int:  # asking what else it may be takes a microsecond
        return value
    if isinstance(value, bool):
        return None
    if isinstance(value, numbers.Real):
        return cast(float, value)  # or what float() takes
    item = getattr(value, "item", None)
    if item is not None and hasattr(value, "__array_interface__") and getattr(value, "shape", None) == ():
        return as_real(item())  # NumPy's without dimensions
    return None


def check_number(name: str, value: object, *, low: float = 0.0, positive: bool = False) -> float:
    """`value` as a finite float, at least `low`, and above zero if `positive`."""
    if type(value) is float and low <= value < math.inf and (value > 0.0 or not positive):
        return value + 0.0  # turns -0.0 into 0.0
    bound = " > 0" if positive else "" if low == LOWEST else f" >= {low:g}"
    allowed = f"a finite number{bound}"
    real = as_real(value)
    if real is None:
        remedy = in_a_string(value, lambda number: number >= low and (number > 0.0 or not positive))
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}{remedy}")
    try:
        number = float(real) + 0.0
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < low or (positive and number == 0.0):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return number


def check_fraction(name: str, value: object, *, positive: bool = False) -> float:
    """`value` as a float from 0 to 1, and above zero if `positive`."""
    allowed = f"a number {'above 0 and at most 1' if positive else 'from 0 to 1'}"
    real = as_real(value)
    if real is None:
        remedy = in_a_string(value, lambda number: 0 <= number <= 1 and (number > 0 or not positive))
        raise TypeError(f"{name} must be {allowed}, got {shown(value)}{remedy}")
    if not 0 <= real <= 1 or (positive and real == 0):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    return float(real) + 0.0


def check_choice(name: str, value: object, allowed: Iterable[str]) -> str:
    """`value` as one of the `allowed` strings."""
    choices = tuple(allowed)
    if isinstance(value, str) and value in choices:
        return str(value)
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be one of {choices}, got {shown(value)}")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """The type of an argparse option that takes an int from `low` to `high`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low} to {high}, got {text!r}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers nonsense with one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists what is allowed)\n")

    def run(self, argv: Sequence[str] | None, command: Callable[[argparse.Namespace], int]) -> int:
        """Run a command with what was parsed; returns its exit code."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have letters that the terminal has not
            sys.stdout.reconfigure(errors="backslashreplace")
        args = self.parse_args(argv)
        try:
            code = command(args)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader went away, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return code
