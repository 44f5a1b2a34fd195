"""The proof of an import: the real object, stepped from its beginning, beside the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nexus.arguments import check_count
from nexus.schedules.base import Schedule
from nexus.schedules.sampled import Sampled

RELATIVE = 1e-11
ABSOLUTE = 1e-15  # of the peak
MAX_STEPS = 20_000
STEPS_WITHOUT_END = 2_000


class ImportMismatch(ValueError):
    """A schedule and the object that it was made of differ; the text names the first step and both rates."""


class NotImportable(TypeError):
    """There is no schedule for this object; the text names the remedy."""


def metric_driven(name: str) -> NotImportable:
    """The error for a scheduler whose rate depends on a metric."""
    return NotImportable(
        f"{name} is metric-driven: its rate depends on the numbers that it is given while training, so that no "
        "schedule of steps has the same rates; give FusedAdamW lr=ReduceOnPlateau(schedule, ...) and report() the "
        "metric, or keep it, and assign the group's 'lr' a number after each of its steps"
    )


def steps_to_prove(schedules: Sequence[Schedule], steps: int | None) -> int:
    """The steps given, or the longest schedule's length and a tenth, at most 20,000; 2,000 where it has no end."""
    if steps is not None:
        return check_count("steps", steps)
    lengths = [each.length for each in schedules]
    ends = [STEPS_WITHOUT_END if length is None else length + max(2, length // 10) for length in lengths]
    return min(MAX_STEPS, max(ends, default=0))


def prove(
    schedules: Sequence[Schedule],
    rates: Iterable[Sequence[float]],
    name: str,
    first: int = 0,
    peaks: Sequence[float] = (),
) -> list[float]:
    """Compare schedules, one a group, with the real rates of the steps from `first` on.

    Args:
        schedules: one a group.
        rates: for each step, the real rate of each group.
        name: what the error calls the real object.
        first: the step of the first of `rates`.
        peaks: the highest rate of each group so far.

    Returns:
        The highest rate of each group.

    Raises:
        ImportMismatch: some rate differs by more than 1e-11 relative plus 1e-15 of the peak.
    """
    highest = list(peaks) or [0.0] * len(schedules)
    for step, real in enumerate(rates, first):
        for group, (schedule, theirs) in enumerate(zip(schedules, real, strict=True)):
            highest[group] = max(highest[group], abs(theirs))
            ours = schedule(step)
            allowed = RELATIVE * abs(theirs) + ABSOLUTE * highest[group]
            if not abs(ours - theirs) <= allowed:
                raise ImportMismatch(
                    f"at step {step}, group {group}, {name} has the rate {theirs!r} and {schedule!r} has {ours!r}; "
                    "exact=True follows the former by a table of its rates"
                )
    return highest


def followed(rates: Iterable[Sequence[float]]) -> list[Schedule]:
    """Tables of the real rates, one a group."""
    return [Sampled(tuple(map(float, each))) for each in zip(*rates, strict=True)]
