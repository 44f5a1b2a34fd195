"""A device for the benchmark that only looks like a GPU, and what makes a benchmark quick to test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases import CUDA
from benchmarks.timing import Call, Device, Sample

KERNELS = (  # of a step, as CUDA calls them, and of a copy
    ("nexus::cuda::(anonymous namespace)::sum_squares(nexus::cuda::Table, double*)", 2.0),
    ("nexus::cuda::(anonymous namespace)::prepare(nexus::cuda::Table, nexus::StepState)", 1.0),
    ("void nexus::cuda::(anonymous namespace)::update_tensors<float, float>(nexus::cuda::Table, bool)", 5.0),
    ("Memcpy DtoD (Device -> Device)", 4.0),
)


class FakeGpu(Device):
    """Runs everything on the CPU, and says that each call took the device 10 µs and the host 5."""

    kind = CUDA
    captured = 0

    def metadata(self) -> dict[str, Any]:
        return {"gpu": "NVIDIA Fake 1", "driver": "1.0", "cuda": "13.0", "triton": "3.6.0"}

    def sample(self, call: Call) -> Sample:
        call()
        return Sample(10.0, 5.0)

    def capture(self, warm: Call, body: Call) -> Call:
        warm()
        self.captured += 1
        return body

    def kernels(self, call: Call, times: int) -> list[tuple[str, float]]:
        for _ in range(times):
            call()
        return [*KERNELS] * times

    def free_bytes(self) -> int | None:
        return None


def refuse_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every capture on a `FakeGpu` fail."""

    def refuse(self: FakeGpu, warm: Call, body: Call) -> Call:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGpu, "capture", refuse)


@pytest.fixture(autouse=True)
def quick_benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For each test of a module that imports this.

    Threads of several test processes would wait for each other; what a test process has loaded takes long to collect.
    """
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
