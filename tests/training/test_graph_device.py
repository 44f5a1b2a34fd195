"""The order in which torch.cuda is asked for a graph, on a double of it."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nexus.training.capture.device import CudaGraphs, graph_device


class Cuda:
    """Stands in for what CudaGraphs uses of torch.cuda. `broken`: ending a capture fails; `empty`: it warns."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.broken = self.empty = False
        self.pools = 0
        self.default_generators = [self]
        self.current = self.Stream("the device", name="the caller's")

    class Stream:
        def __init__(self, device: Any, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            CUDA[0].events.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert not gc.isenabled()
            CUDA[0].events.append(f"begin in pool {pool}, {capture_error_mode}, on {CUDA[0].current.name}")

        def capture_end(self) -> None:
            CUDA[0].events.append("end")
            if CUDA[0].broken:
                raise RuntimeError("capture was invalidated")
            if CUDA[0].empty:
                warnings.warn("The CUDA Graph is empty.", UserWarning, stacklevel=2)

    def current_stream(self, device: Any) -> Stream:
        return self.current

    def current_device(self) -> int:
        return 0

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def synchronize(self, device: Any) -> None:
        self.events.append("synchronize")

    def empty_cache(self) -> None:
        self.events.append("empty cache")

    def clone_state(self) -> str:
        return "spare"

    def _cuda_endAllocateToPool(self, device: int, pool: int) -> None:
        self.events.append(f"allocator leaves pool {pool}")

    def _cuda_releasePool(self, device: int, pool: int) -> None:
        self.events.append(f"pool {pool} is released")

    def graphsafe_set_state(self, state: str) -> None:
        self.events.append(f"generator takes {state}")


CUDA: list[Cuda] = []
RECOVERY = ["allocator leaves pool 1", "pool 1 is released", "generator takes spare"]
BEGIN = ["synchronize", "empty cache", "begin in pool 1, thread_local, on side"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    double = Cuda()
    CUDA[:] = [double]
    for name in dir(double):
        if hasattr(torch.cuda, name) and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, getattr(double, name))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch.cuda.memory, name, getattr(double, name))
    yield double
    assert gc.isenabled()


def graphs() -> CudaGraphs:
    found = graph_device(torch.device("cuda", 0))
    assert isinstance(found, CudaGraphs)
    return found


def test_there_are_graphs_on_cuda_alone() -> None:
    assert graph_device(torch.device("cpu")) is None


def test_the_side_stream_waits_and_is_waited_for(cuda: Cuda) -> None:
    device = graphs()
    with contextlib.suppress(KeyError), device.side_stream():
        cuda.events.append(f"on {cuda.current.name}")
    assert cuda.events == ["side waits for the caller's", "on side", "the caller's waits for side"]


def test_a_capture(cuda: Cuda) -> None:
    device = graphs()
    graph, result = device.capture(lambda: cuda.events.append("run") or 5)
    assert isinstance(graph, Cuda.CUDAGraph)
    assert result == 5
    assert cuda.events == [*BEGIN, "run", "end"]


@pytest.mark.parametrize(("broken", "empty"), [(False, False), (True, False), (False, True)])
def test_an_error_in_a_capture_is_raised_as_it_is(broken: bool, empty: bool, cuda: Cuda) -> None:
    device = graphs()
    cuda.broken, cuda.empty = broken, empty
    error = KeyError("mine")

    def run() -> None:
        raise error

    with pytest.raises(KeyError) as raised:
        device.capture(run)
    assert raised.value is error
    assert cuda.events == [*BEGIN, "end", *(RECOVERY if broken else [])]
    cuda.events.clear()
    cuda.broken = cuda.empty = False
    device.capture(lambda: None)
    assert cuda.events[2] == f"begin in pool {2 if broken else 1}, thread_local, on side"


def test_a_capture_that_cannot_be_ended(cuda: Cuda) -> None:
    cuda.broken = True
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        graphs().capture(lambda: None)
    assert cuda.events == [*BEGIN, "end", *RECOVERY]


def test_a_torch_that_recovers_by_itself(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(device: int, pool: int) -> None:
        raise RuntimeError("not currently recording to the pool")

    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", ended)
    cuda.broken = True
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        graphs().capture(lambda: None)
    assert cuda.events[-1] == "generator takes spare"  # and the pool is not released twice
