"""What was measured, as records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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
class Comparison:
    """Times in microseconds."""

    nexus: Spread
    peer: Spread | None  # None: it cannot do this
    ratio: Spread | None  # peer's time / nexus's time of each pair

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Comparison:
        """Of nexus's time and its peer's, each measured next to the other."""
        ours, theirs = zip(*pairs, strict=True)
        return cls(Spread.of(ours), Spread.of(theirs), Spread.of([b / a for a, b in pairs]))


@dataclass(frozen=True)
class Row:
    """nexus beside one peer at one job."""

    case: str
    title: str
    device: str
    dtype: str
    tensors: int
    elements: int
    groups: int
    job: str
    peer: str
    backend: str  # of nexus
    time: Comparison  # on a CPU until the call returns, on a GPU what the device takes
    pairs: int
    difference: float | None  # of the parameters afterwards, see contestants.difference; in training of the losses
    bytes_moved: int | None  # that nexus needs to load and store; None: not counted, in training
    # On a GPU alone:
    host: Comparison | None = None  # what the host takes to enqueue a step
    replay: Comparison | None = None  # the device, replaying a CUDA graph of the step
    replay_host: Comparison | None = None  # the host, starting the replay
    loop: Comparison | None = None  # in training: wall-clock time of a step, of several in a row
    remark: str = ""


@dataclass(frozen=True)
class LeftOut:
    """What is not among the rows, and why."""

    case: str
    job: str
    peer: str
    reason: str
    failed: bool  # by a fault of nexus's, or since the two sides disagree: the run has then failed


@dataclass(frozen=True)
class HostRow:
    """A quantity of the second table."""

    what: str
    unit: str
    value: Spread


@dataclass
class Results:
    """Of one run, as far as it has come."""

    metadata: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    host: list[HostRow] = field(default_factory=list)
    complete: bool = False


def _quantile(ordered: Sequence[float], q: float) -> float:
    """Linear between the two nearest."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
