"""The order in which torch.cuda is asked for a graph, on a double of it."""

from __future__ import annotations

import gc
import warnings
from unittest import mock

import pytest
import torch

from nexus.training.capture.device import CudaGraphs, graph_device

USED = ["CUDAGraph", "Stream", "current_device", "current_stream", "default_generators"]
USED += ["empty_cache", "graph_pool_handle", "stream", "synchronize"]
GENERATOR = "default_generators.__getitem__()"
RECOVERY = ["current_device", "_cuda_endAllocateToPool", "current_device", "_cuda_releasePool"]
RECOVERY += [f"{GENERATOR}.graphsafe_set_state", "graph_pool_handle", "Stream"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    double = mock.MagicMock()
    double.graph_pool_handle.side_effect = [1, 2]
    double.stream.return_value.__exit__.return_value = None  # swallows no exception
    for name in USED:
        monkeypatch.setattr(torch.cuda, name, getattr(double, name))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch.cuda.memory, name, getattr(double, name))
    return double


def make_graphs(cuda: mock.MagicMock) -> CudaGraphs:
    found = graph_device(torch.device("cuda", 0))
    assert isinstance(found, CudaGraphs)
    cuda.reset_mock()
    return found


def calls(cuda: mock.MagicMock) -> list[str]:
    return [name for name, *_ in cuda.mock_calls]


def test_there_are_graphs_on_cuda_alone() -> None:
    assert graph_device(torch.device("cpu")) is None


def test_the_side_stream_waits_and_is_waited_for(cuda: mock.MagicMock) -> None:
    graphs = make_graphs(cuda)
    cuda.run.side_effect = KeyError
    with pytest.raises(KeyError), graphs.side_stream():
        cuda.run()
    inside = ["stream", "stream().__enter__", "run", "stream().__exit__"]
    assert calls(cuda) == ["current_stream", "Stream().wait_stream", *inside, "current_stream().wait_stream"]
    side, current = cuda.Stream.return_value, cuda.current_stream.return_value
    side.wait_stream.assert_called_with(current)
    cuda.stream.assert_called_with(side)
    current.wait_stream.assert_called_with(side)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("error", [None, KeyError("mine")], ids=str)
def test_a_capture(error: KeyError | None, broken: bool, cuda: mock.MagicMock) -> None:
    """An error in it is raised as it is; one that CUDA has ended leaves nothing to the next."""

    def run() -> int:
        assert not gc.isenabled()
        cuda.run()
        if error is not None:
            raise error
        return 5

    graphs, graph = make_graphs(cuda), cuda.CUDAGraph.return_value
    invalidated = RuntimeError("capture was invalidated")
    graph.capture_end.side_effect = invalidated if broken else None
    if error is None and not broken:
        assert graphs.capture(run) == (graph, 5)
    else:
        with pytest.raises((KeyError, RuntimeError)) as raised:
            graphs.capture(run)
        assert raised.value is (error or invalidated)
    assert gc.isenabled()
    assert calls(cuda) == [
        *["synchronize", "empty_cache", "stream", "stream().__enter__"],
        *["CUDAGraph", "current_device", "default_generators.__getitem__", f"{GENERATOR}.clone_state"],
        *["CUDAGraph().capture_begin", "run", "CUDAGraph().capture_end"],
        *(RECOVERY if broken else []),
        "stream().__exit__",
    ]
    cuda.stream.assert_called_with(cuda.Stream.return_value)
    graph.capture_begin.assert_called_with(pool=1, capture_error_mode="thread_local")
    if broken:
        generator = cuda.default_generators.__getitem__.return_value
        generator.graphsafe_set_state.assert_called_with(generator.clone_state.return_value)
        for release in (cuda._cuda_endAllocateToPool, cuda._cuda_releasePool):
            release.assert_called_once_with(cuda.current_device.return_value, 1)
    graph.capture_end.side_effect = None
    graphs.capture(lambda: None)
    graph.capture_begin.assert_called_with(pool=2 if broken else 1, capture_error_mode="thread_local")


def test_an_empty_graph_hides_no_error(cuda: mock.MagicMock) -> None:
    graphs, error = make_graphs(cuda), KeyError("mine")
    cuda.CUDAGraph.return_value.capture_end.side_effect = lambda: warnings.warn("The graph is empty", stacklevel=2)
    with pytest.raises(KeyError) as raised:  # warnings are errors here
        graphs.capture(mock.Mock(side_effect=error))
    assert raised.value is error


def test_a_torch_that_recovers_by_itself(cuda: mock.MagicMock) -> None:
    graphs = make_graphs(cuda)
    cuda.CUDAGraph.return_value.capture_end.side_effect = RuntimeError("capture was invalidated")
    cuda._cuda_endAllocateToPool.side_effect = RuntimeError("not currently recording to the pool")
    with pytest.raises(RuntimeError, match="capture was invalidated"):
        graphs.capture(lambda: None)
    cuda._cuda_releasePool.assert_not_called()  # which torch has done
