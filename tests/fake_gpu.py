"""A device for the benchmark that only looks like a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import CUDA
from benchmarks.timing import Sample


class FakeGpu:
    """Runs everything on the CPU, and says that each call took the device 10 µs and the host 5."""

    kind = CUDA
    where = torch.device("cpu")
    limit_s: float | None = None

    def __init__(self) -> None:
        self.captured = 0
        self.settled = 0

    def metadata(self) -> dict[str, Any]:
        return {"gpu": "NVIDIA Fake 1", "driver": "1.0", "cuda": "13.0", "triton": "3.6.0"}

    def sample(self, call: Callable[[], object]) -> Sample:
        call()
        return Sample(10.0, 5.0)

    def wait(self) -> None:
        pass

    def capture(self, warm: Callable[[], object], body: Callable[[], object]) -> Callable[[], object]:
        warm()
        self.captured += 1
        return body

    def free_bytes(self) -> int | None:
        return None

    def settle(self) -> None:
        self.settled += 1
