"""Times calls on a GPU: by CUDA events, and replayed from a CUDA graph."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import CUDA
from benchmarks.peers import installed_version, versions
from benchmarks.timing import Device, Sample, microseconds

CAPTURE_WARMUP = 2
MAX_DELAY_US = 20_000.0
SLEEP_CYCLES = 5_000_000  # over which the clock of `torch.cuda._sleep` is measured


def unavailable() -> str | None:
    """Why there is no GPU to time on; None if there is one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no GPU"


class Cuda(Device):
    """The current GPU."""

    kind = CUDA
    limit_s = 0.5

    def __init__(self) -> None:
        self.where = torch.device(CUDA, torch.cuda.current_device())
        self._start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._cycles_per_us = self._measure_clock()

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

    def sample(self, call: Callable[[], object]) -> Sample:
        """Time `call` twice: how long the host takes on an idle device, then how long the device takes.

        The second time the device is kept waiting until the host has enqueued everything: what is measured is
        the work, not the gaps that a slow host leaves. Calls that wait for the device themselves keep theirs.
        """
        torch.cuda.synchronize()
        host_us = microseconds(call)
        torch.cuda.synchronize()
        self._delay(host_us)
        self._start.record()
        call()
        self._end.record()
        torch.cuda.synchronize()
        return Sample(self._elapsed_us(), host_us)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def capture(self, warm: Callable[[], object], body: Callable[[], object]) -> Callable[[], object] | None:
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

    def settle(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def _elapsed_us(self) -> float:
        return float(self._start.elapsed_time(self._end)) * 1e3

    def _measure_clock(self) -> float:
        """Cycles a microsecond. Measured on a device that has just been busy: an idle one's clock is slow."""
        for _ in range(3):
            self._start.record()
            torch.cuda._sleep(SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            self._end.record()
            torch.cuda.synchronize()
        return SLEEP_CYCLES / self._elapsed_us()

    def _delay(self, host_us: float) -> None:
        """Keep the device busy for longer than the host will take: half as much again, and 50 µs."""
        delay_us = min(1.5 * host_us + 50.0, MAX_DELAY_US)
        torch.cuda._sleep(int(delay_us * self._cycles_per_us))  # type: ignore[no-untyped-call]


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.split("\n")[0].strip() or None
