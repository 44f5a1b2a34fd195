"""The CUDA backend without a GPU: its kernels, compiled as C++, run on tensors of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from cuda_shim import build
from cuda_shim.controls import Graph, Shim
from torch import Tensor

from nexus import backends
from nexus.backends import cuda
from nexus.backends.watched import make_records
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of

NAME = "cuda on cpu"


@functools.cache
def extension() -> ModuleType:
    return build.load()


@functools.cache
def shim() -> Shim:
    """What steers the kernels. Streams are numbers; 0 is the null stream of device 0."""
    return Shim(extension().__file__)


def allocate(device: int, nbytes: int, stream: int) -> int:
    """See `nexus.backends.cuda.allocate`."""
    address = shim().allocate(device, nbytes)
    if address is None:
        raise torch.cuda.OutOfMemoryError(f"the shim does not give {nbytes} bytes")
    return address


def release(address: int) -> None:
    assert shim().free(address) == 0


class Runner(cuda.CudaRunner):
    def __init__(self, tensors: Any) -> None:
        super().__init__(tensors)
        self.stream = 0

    def current_stream(self, device: torch.device) -> tuple[int, int]:  # type: ignore[override]
        return device.index or 0, self.stream


class Backend:
    """See `nexus.backends.interface.Backend`."""

    NAME = NAME
    DEVICE_TYPES = frozenset({"cpu"})

    def unavailable(self, devices: Iterable[torch.device] = ()) -> str | None:
        return None

    def detail(self) -> str:
        return "for tests"

    def runner(self, setting_names: tuple[str, ...]) -> Runner:
        records = functools.partial(extension().CudaRecords, allocate, release)
        return Runner(make_records(records, setting_names))

    def evaluate(self, table: Tensor, steps: Tensor) -> Tensor:
        steps = steps.contiguous()
        out = torch.empty(steps.shape, dtype=torch.float64, device=steps.device)
        (layers, rows, _), count = table.shape, steps.numel()
        extension().cuda_evaluate(0, table.data_ptr(), layers, rows, steps.data_ptr(), count, out.data_ptr(), 0)
        return out


backends._BACKENDS[NAME] = Backend()


def runner_of(optimizer: FusedAdamW) -> Runner:
    runner = engine_of(optimizer).prepare(vars(optimizer))
    assert isinstance(runner, Runner)
    return runner


def captured_step(optimizer: FusedAdamW) -> Graph:
    """A step with the gradients that are there, kept for replays."""
    runner = runner_of(optimizer)
    runner.stream = shim().stream()
    with shim().capture(runner.stream) as graph:
        optimizer.step()
    runner.stream = 0
    return graph
