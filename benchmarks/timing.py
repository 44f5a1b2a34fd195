"""Where calls are timed, on the processor or on a GPU, and how two of them are: in turns."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import CPU, CUDA
from benchmarks.peers import installed_version, versions

T = TypeVar("T")
Call = Callable[[], object]
FEWEST_PAIRS = 8  # however long they take
CAPTURE_WARMUP = 2
MAX_DELAY_US = 20_000.0
SLEEP_CYCLES = 5_000_000  # over which the clock of `torch.cuda._sleep` is measured


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
        return {"peers": versions()}

    def sample(self, call: Call) -> Sample:
        """Time `call`, which may be made more than once."""
        taken = microseconds(call)
        return Sample(taken, taken)

    def wait(self) -> None:
        """Return when the device has done all that it was given."""

    def capture(self, warm: Call, body: Call) -> Call | None:
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

    def lacks(self, needed: int) -> str | None:
        """In words, where less memory than so many bytes is free."""
        free = self.free_bytes()
        if free is None or free >= needed:
            return None
        return f"it needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"

    def kernels(self, call: Call, times: int) -> list[tuple[str, float]]:
        """The name of each kernel and copy that so many calls enqueue, and its microseconds, in order."""
        return []

    def settle(self) -> None:
        """Give back the memory of what has been dropped."""
        gc.collect()


PROCESSOR = Device()


class Cuda(Device):
    """The current GPU: calls are timed by CUDA events, and replayed from a CUDA graph."""

    kind = CUDA
    limit_s = 0.5

    def __init__(self) -> None:
        self.where = torch.device(CUDA, torch.cuda.current_device())
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(3):  # an idle device's clock is slow: the last counts
            sleeping_us = self._between_events(lambda: torch.cuda._sleep(SLEEP_CYCLES))  # type: ignore[no-untyped-call]
        self._cycles_per_us = SLEEP_CYCLES / sleeping_us

    def metadata(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.where)
        return {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda or torch.version.hip,
            "driver": _driver(),
            "triton": installed_version("triton"),
            "peers": versions(),
        }

    def sample(self, call: Call) -> Sample:
        """Time `call` twice: how long the host takes on an idle device, then how long the device takes.

        The second time the device is kept waiting until the host has enqueued everything: what is measured is
        the work, not the gaps that a slow host leaves. Calls that wait for the device themselves keep theirs.
        """
        torch.cuda.synchronize()
        host_us = microseconds(call)
        torch.cuda.synchronize()
        delay_us = min(1.5 * host_us + 50.0, MAX_DELAY_US)  # longer than the host will take
        torch.cuda._sleep(int(delay_us * self._cycles_per_us))  # type: ignore[no-untyped-call]
        return Sample(self._between_events(call), host_us)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def capture(self, warm: Call, body: Call) -> Call | None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_WARMUP):
                warm()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        torch.cuda.synchronize()
        return graph.replay

    def free_bytes(self) -> int | None:
        self.settle()
        return int(torch.cuda.mem_get_info()[0])

    def kernels(self, call: Call, times: int) -> list[tuple[str, float]]:
        return profiled(call, times, ProfilerActivity.CUDA)

    def settle(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def _between_events(self, call: Call) -> float:
        """Microseconds of the device."""
        self._start.record()
        call()
        self._end.record()
        torch.cuda.synchronize()
        return float(self._start.elapsed_time(self._end)) * 1e3


def cuda_unavailable() -> str | None:
    """Why there is no GPU to time on; None if there is one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n")[0].strip() or None


def profiled(call: Call, times: int, activity: ProfilerActivity) -> list[tuple[str, float]]:
    """What torch's profiler sees of so many calls on one kind of device, in order."""
    with profile(activities=[activity]) as profiler:
        for _ in range(times):
            call()
        if activity == ProfilerActivity.CUDA:
            torch.cuda.synchronize()
    seen = [event for event in profiler.events() if event.device_type.name == activity.name]
    seen.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in seen]


def microseconds(call: Call) -> float:
    """What one call takes on the host's clock."""
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) / 1e3


def interleaved(
    first: Callable[[], T], second: Callable[[], T], repeats: int, limit_s: float | None = None
) -> list[tuple[T, T]]:
    """What two measurements return, `repeats` pairs, of which every other begins with the second.

    A few pairs before them are not counted: state is allocated, threads and caches are cold. Once `limit_s` seconds
    are over, no more are begun than make `FEWEST_PAIRS`. Python's garbage collector is off meanwhile.
    """
    pairs: list[tuple[T, T]] = []
    warmup = 2 + min(20, repeats // 5)
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
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
    finally:
        if was_enabled:
            gc.enable()
    return pairs[warmup:]
