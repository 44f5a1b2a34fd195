"""CUDA graphs without a GPU: a double of `nexus.training.capture.device` that records a step and can run it again.

What a step does is recorded operation by operation, with the tensors it does it to. A replay repeats these
operations on these tensors, and nothing else: a number from the host is what it was, and Python does not run.
`FusedAdamW(backend="cuda on cpu")` launches its kernels, which are captured by their own shim; those of
`backend="triton"` run in replays alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from cuda_on_cpu import Backend, Runner, extension, shim
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nexus.backends import triton, watched
from nexus.training.capture import device as graph_device


class Graph:
    def __init__(self, events: list[str]) -> None:
        self.work: list[Callable[[], Any]] = []
        self._events = events

    def replay(self) -> None:
        self._events.append("replay")
        with torch.no_grad():
            for work in self.work:
                work()


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Recorder(TorchDispatchMode):
    """Records operations. They run, for their results' shapes; what they overwrite is brought back at the end."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.overwritten: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        block = torch.empty(0, dtype=torch.uint8).set_(storage)
        self.overwritten.setdefault(storage._cdata, (block, block.clone()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):  # more than is needed
            self.keep(tensor)
        result = func(*args, **kwargs)
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in given]
        args, kwargs = tree_map_only(Tensor, Tensor.detach, (args, kwargs))

        def work() -> None:
            again = func(*args, **kwargs)
            for tensor, value in zip(_tensors(result), _tensors(again), strict=True):
                if any(tensor is one for one in made):
                    tensor.copy_(value)

        self.graph.work.append(work)
        return result

    def restore(self) -> None:
        for block, value in self.overwritten.values():
            block.copy_(value)


class Graphs:
    """See `nexus.training.capture.device.GraphDevice`. `events` tells what was done, in which order."""

    recorder = _Recorder

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.events: list[str] = []
        self.fail: BaseException | None = None

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        self.events.append("side stream")
        yield
        self.events.append("main stream")

    def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        self.events.append("capture")
        graph = Graph(self.events)
        recorder = self.recorder(graph)
        try:
            with recorder, _kernels_captured(graph), _triton_captured(graph):
                result = run()
            if self.fail is not None:
                raise self.fail
        finally:
            recorder.restore()
        return graph, result

    def random_state(self) -> Tensor:
        self.events.append("random state")
        return torch.get_rng_state()

    def set_random_state(self, state: Tensor) -> None:
        self.events.append("set random state")
        torch.set_rng_state(state)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Lets steps on the CPU be captured."""
    shim().reset()
    double = Graphs()
    monkeypatch.setattr(graph_device, "graph_device", lambda device: double)
    yield double
    shim().reset()


@contextlib.contextmanager
def _kernels_captured(graph: Graph) -> Iterator[None]:
    """Let kernels that are launched on the shim go into a graph of it; after a sum over processes, into another."""
    run, total_everywhere = Runner._run, watched.total_everywhere
    capture = contextlib.ExitStack()

    def begin(runner: Runner) -> None:
        runner.stream = shim().stream()
        kernels = capture.enter_context(shim().capture(runner.stream))
        capture.callback(lambda: graph.work.append(kernels.replay))

    def captured_run(self: Runner, *args: Any) -> None:
        def total(*sums: Any) -> Tensor | None:
            capture.close()
            found_inf = total_everywhere(*sums)
            begin(self)
            return found_inf

        begin(self)
        try:
            with mock.patch.object(watched, "total_everywhere", total):
                run(self, *args)
        finally:
            capture.close()
            self.stream = 0

    def captured_evaluate(self: Backend, table: Tensor, steps: Tensor) -> Tensor:
        out = torch.empty(steps.shape, dtype=torch.float64)
        (layers, rows, _), count = table.shape, steps.numel()

        def work() -> None:
            at = steps.data_ptr()
            extension().cuda_evaluate(0, table.data_ptr(), layers, rows, at, count, out.data_ptr(), 0)

        work()
        graph.work.append(work)
        return out

    with mock.patch.object(Runner, "_run", captured_run), mock.patch.object(Backend, "evaluate", captured_evaluate):
        yield


class _TritonLaunches:
    """Stands in for the module of Triton's kernels: `kernels.update[grid](...)` becomes a part of a graph."""

    def __init__(self, graph: Graph, launching: Callable[[torch.device], Any]) -> None:
        self._graph = graph
        self._launching = launching

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[_TritonLaunches]:
        self._device = device
        yield self

    def __getattr__(self, name: str) -> mock.MagicMock:
        kernel = mock.MagicMock()
        kernel.__getitem__.side_effect = lambda grid: functools.partial(self._launch, self._device, name, grid)
        return kernel

    def _launch(self, device: torch.device, name: str, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        def work() -> None:
            with self._launching(device) as kernels:
                getattr(kernels, name)[grid](*args, **options)

        self._graph.work.append(work)


@contextlib.contextmanager
def _triton_captured(graph: Graph) -> Iterator[None]:
    launches = _TritonLaunches(graph, triton._launching)
    with mock.patch.multiple(triton, _launching=launches, is_capturing=mock.Mock(return_value=True)):
        yield
