"""Where calls are timed, and how two of them are: in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.cases import CPU

T = TypeVar("T")
FEWEST_PAIRS = 8  # however long they take


@dataclass(frozen=True)
class Sample:
    """What one call took, in microseconds."""

    us: float  # until its work was done, on the device that does it
    host_us: float  # until it returned


class Device:
    """Where the tensors are, and how to time what is done with them: the processor. A GPU is a subclass."""

    kind = CPU
    where = torch.device("cpu")
    limit_s: float | None = None  # for all pairs of one comparison: beyond it, fewer are timed

    def metadata(self) -> dict[str, Any]:
        """What times depend on, beyond the processor; a GPU's name is `"gpu"`."""
        return {}

    def sample(self, call: Callable[[], object]) -> Sample:
        """Time `call`, which may be made more than once."""
        taken = microseconds(call)
        return Sample(taken, taken)

    def wait(self) -> None:
        """Return when the device has done all that it was given."""

    def capture(self, warm: Callable[[], object], body: Callable[[], object]) -> Callable[[], object] | None:
        """What replays `body`, after it was run as `warm`; None where there are no graphs."""
        return None

    def free_bytes(self) -> int | None:
        """Memory that may still be taken, where that is known."""
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
        return None if kilobytes is None else int(kilobytes) * 1024

    def settle(self) -> None:
        """Give back the memory of what has been dropped."""
        gc.collect()


PROCESSOR = Device()


def microseconds(call: Callable[[], object]) -> float:
    """What one call takes on the host's clock."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def interleaved(
    first: Callable[[], T], second: Callable[[], T], repeats: int, limit_s: float | None = None
) -> list[tuple[T, T]]:
    """What two measurements return, `repeats` pairs, of which every other begins with the second.

    A few pairs before them are not counted: state is allocated, threads and caches are cold. Once `limit_s` seconds
    are over, no more are begun than make `FEWEST_PAIRS`.
    """
    pairs: list[tuple[T, T]] = []
    warmup = 2 + min(20, repeats // 5)
    with _without_collector():
        for i in range(warmup + repeats):
            if i == warmup:
                started = time.monotonic()
            enough = len(pairs) >= warmup + FEWEST_PAIRS
            if limit_s is not None and enough and time.monotonic() - started > limit_s:
                break
            if i % 2:
                b, a = second(), first()
            else:
                a, b = first(), second()
            pairs.append((a, b))
    return pairs[warmup:]


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
