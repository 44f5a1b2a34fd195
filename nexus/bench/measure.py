"""Times two calls in turns, and says how many times as fast one is as the other."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from nexus.bench import contestants
from nexus.bench.cases import STEP, TRAFFIC, Case

TOLERANCE = 5e-3
"""Of `contestants.difference`. Rounding of float32 parameters that go a short way is a tenth of that."""


@dataclass(frozen=True)
class Spread:
    """A median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        ordered = sorted(values)
        return cls(*(_quantile(ordered, q) for q in (0.5, 0.2, 0.8)))


@dataclass(frozen=True)
class Row:
    """nexus beside one peer at one job. Times are medians in microseconds."""

    case: str
    title: str
    tensors: int
    elements: int
    groups: int
    job: str
    peer: str
    nexus_us: float
    peer_us: float
    ratio: Spread  # peer's time / nexus's time of each pair; beside TRAFFIC: the share of that limit
    pairs: int
    difference: float | None  # of the parameters afterwards, see contestants.difference


class Disagreement(Exception):
    """Two optimizers that were timed have not done the same."""


def measure(case: Case, repeats: int) -> Iterator[Row]:
    """Time a case: every job, beside every peer, `repeats` pairs each.

    Raises:
        Disagreement: the parameters differ afterwards. The times then mean nothing.
    """
    for job in case.jobs:
        for name in case.peers:
            ours = contestants.nexus(case, job)
            theirs = contestants.peer(case, job, name)
            times = interleaved(ours.call, theirs.call, repeats)
            difference = contestants.difference(ours, theirs)
            if not difference < TOLERANCE:
                raise Disagreement(
                    f"{case.name}, {job}: the parameters of nexus and of torch ({name}) differ by "
                    f"{difference:.1e} of the way that they went"
                )
            yield _row(case, job, name, times, difference)
            del ours, theirs  # before the next ones are made: they may be large
        if case.memory_bound and job == STEP:
            ours = contestants.nexus(case, job)
            if ours.traffic is not None:
                yield _row(case, job, TRAFFIC, interleaved(ours.call, ours.traffic, repeats), None)
            del ours


def interleaved(first: Callable[[], object], second: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
    """Microseconds of two calls, `repeats` pairs, of which every other begins with the second.

    A few pairs before them are not counted: state is allocated, threads and caches are cold.
    """
    pairs = []
    warmup = 2 + min(20, repeats // 5)
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(warmup + repeats):
            if i % 2:
                b, a = microseconds(second), microseconds(first)
            else:
                a, b = microseconds(first), microseconds(second)
            pairs.append((a, b))
    finally:
        if was_enabled:
            gc.enable()
    return pairs[warmup:]


def microseconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def _row(case: Case, job: str, peer: str, times: list[tuple[float, float]], difference: float | None) -> Row:
    return Row(
        case=case.name,
        title=case.title,
        tensors=len(case.shapes),
        elements=case.elements,
        groups=case.groups,
        job=job,
        peer=peer,
        nexus_us=statistics.median(a for a, _ in times),
        peer_us=statistics.median(b for _, b in times),
        ratio=Spread.of([b / a for a, b in times]),
        pairs=len(times),
        difference=difference,
    )


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between the two nearest."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
