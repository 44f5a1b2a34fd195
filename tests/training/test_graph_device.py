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

events: list[str] = []


class Cuda:
    """Stands in for what CudaGraphs uses of torch.cuda. `broken`: ending a capture fails, and elsewhere it warns."""

    broken = False
    on = ""  # the name of the current stream

    class Stream:
        def __init__(self, device: Any, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Any) -> None:
            events.append(f"{self.name} waits for {other.name}")

    class CUDAGraph:
        def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
            assert not gc.isenabled()
            events.append(f"begin in pool {pool}, {capture_error_mode}, on {Cuda.on}")

        def capture_end(self) -> None:
            events.append("end")
            if Cuda.broken:
                raise RuntimeError("capture was invalidated")
            warnings.warn("The CUDA Graph is empty.", stacklevel=2)

    def __init__(self) -> None:
        self.pools = 0
        self.default_generators = [self]

    def current_stream(self, device: Any) -> Stream:
        return self.Stream(device, Cuda.on)

    def current_device(self) -> int:
        return 0

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, Cuda.on = Cuda.on, stream.name
        yield
        Cuda.on = before

    def graph_pool_handle(self) -> int:
        self.pools += 1
        return self.pools

    def synchronize(self, device: Any) -> None:
        events.append("synchronize")

    def empty_cache(self) -> None:
        events.append("empty cache")

    def clone_state(self) -> str:
        return "spare"

    def _cuda_endAllocateToPool(self, device: int, pool: int) -> None:
        events.append(f"allocator leaves pool {pool}")

    def _cuda_releasePool(self, device: int, pool: int) -> None:
        events.append(f"pool {pool} is released")

    def graphsafe_set_state(self, state: str) -> None:
        events.append(f"generator takes {state}")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaGraphs]:
    events.clear()
    monkeypatch.setattr(Cuda, "on", "the caller's")
    double = Cuda()
    for name in dir(double):
        if hasattr(torch.cuda, name) and not name.startswith("_"):
            monkeypatch.setattr(torch.cuda, name, getattr(double, name))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch.cuda.memory, name, getattr(double, name))
    found = graph_device(torch.device("cuda", 0))
    assert isinstance(found, CudaGraphs)
    yield found
    assert gc.isenabled()


def test_there_are_graphs_on_cuda_alone() -> None:
    assert graph_device(torch.device("cpu")) is None


def test_the_side_stream_waits_and_is_waited_for(device: CudaGraphs) -> None:
    with contextlib.suppress(KeyError), device.side_stream():
        events.append(f"on {Cuda.on}")
    assert events == ["side waits for the caller's", "on side", "the caller's waits for side"]


EMPTY = pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
RECOVERY = ["allocator leaves pool 1", "pool 1 is released", "generator takes spare"]


@EMPTY
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("error", [None, KeyError("mine")], ids=str)
def test_a_capture(error: KeyError | None, broken: bool, device: CudaGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in it is raised as it is; one that CUDA has ended leaves nothing to the next."""

    def run() -> int:
        events.append(f"run on {Cuda.on}")
        if error is not None:
            raise error
        return 5

    begin = "begin in pool {}, thread_local, on side"
    with monkeypatch.context() as patch:
        patch.setattr(Cuda, "broken", broken)
        if error is None and not broken:
            graph, result = device.capture(run)
            assert isinstance(graph, Cuda.CUDAGraph)
            assert result == 5
        else:
            with pytest.raises(RuntimeError if error is None else KeyError) as raised:
                device.capture(run)
            assert str(raised.value) == "capture was invalidated" if error is None else raised.value is error
    recovered = RECOVERY if broken else []
    assert events == ["synchronize", "empty cache", begin.format(1), "run on side", "end", *recovered]
    events.clear()
    device.capture(lambda: None)
    assert events[2] == begin.format(2 if broken else 1)


def test_an_empty_graph_hides_no_error(device: CudaGraphs) -> None:
    def run() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):  # warnings are errors here
        device.capture(run)


@EMPTY
def test_a_torch_that_recovers_by_itself(device: CudaGraphs, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(device: int, pool: int) -> None:
        raise RuntimeError("not currently recording to the pool")

    monkeypatch.setattr(torch.cuda.memory, "_cuda_endAllocateToPool", ended)
    monkeypatch.setattr(Cuda, "broken", True)
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        device.capture(lambda: None)
    assert events[-2:] == ["end", "generator takes spare"]  # and the pool is not released twice
