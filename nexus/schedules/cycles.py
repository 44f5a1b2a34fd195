"""Where the cycles of warm restarts begin, in integers: never by a logarithm, never by a sum of floats."""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

from nexus.arguments import MAX_STEP
from nexus.schedules.curves import MAX_SEGMENTS, NEVER


class CycleRun(NamedTuple):
    """Consecutive cycles of equal length: the step they begin at, their length, the first one's index."""

    start: int
    length: int
    first: int


@lru_cache(maxsize=256)
def cycle_runs(cycle_length: int, cycle_mult: float) -> tuple[CycleRun, ...]:
    """The cycles of T_i = int(cycle_length * cycle_mult**i) steps that begin at step 2**53 or before.

    A T_i above 2**62 is taken as 2**62. The last run covers step 2**53.

    Raises:
        ValueError: more runs than a schedule may have rows (`cycle_mult` is barely above 1).
    """

    def length(i: int) -> int:
        try:
            return int(min(cycle_length * cycle_mult**i, float(NEVER)))
        except OverflowError:
            return NEVER

    runs: list[CycleRun] = []
    start, index = 0, 0
    while start <= MAX_STEP:
        if len(runs) + 1 == MAX_SEGMENTS:  # the warm-up is a row too
            raise ValueError(
                f"cycle_mult={cycle_mult!r} with cycle_length={cycle_length} makes more than "
                f"{MAX_SEGMENTS:,} cycle lengths before step 2**53; "
                "cycle_mult must be 1.0 (equal cycles) or at least 1.0004"
            )
        runs.append(CycleRun(start, length(index), index))
        # T_i never falls as i grows, so the run's end is found by doubling, then by bisection.
        reach = 1
        while reach <= MAX_STEP and length(index + reach) == runs[-1].length:
            reach *= 2
        candidates = range(index + reach // 2, index + reach)
        end = candidates.start + bisect_right(candidates, runs[-1].length, key=length)
        start, index = start + (end - index) * runs[-1].length, end
    return tuple(runs)


def run_at(runs: tuple[CycleRun, ...], step: int) -> CycleRun:
    """The run that `step` is in."""
    return runs[bisect_right(runs, step, key=lambda run: run.start) - 1]
