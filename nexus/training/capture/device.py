"""All that the capture of a train step asks of torch.cuda. Tests put a double in its place."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.cuda import memory

T = TypeVar("T")


class Graph(Protocol):
    """Work that was captured."""

    def replay(self) -> None:
        """Enqueue it on the current stream."""


class GraphDevice(Protocol):
    """A device that captures graphs."""

    device: torch.device

    def side_stream(self) -> contextlib.AbstractContextManager[None]:
        """Run on another stream, which waits for the caller's at the start, and the caller's for it at the end."""

    def capture(self, run: Callable[[], T]) -> tuple[Graph, T]:
        """What `run` enqueues, as a graph, and what it returns. An error of `run` is raised as it is."""

    def random_state(self) -> Any:
        """Of the generators of the CPU and of the device."""

    def set_random_state(self, state: Any) -> None:
        """Go back to what `random_state` gave."""


def graph_device(device: torch.device) -> GraphDevice | None:
    """What captures graphs of work on `device`; None where nothing does, and steps run eagerly."""
    return CudaGraphs(device) if device.type == "cuda" else None


class CudaGraphs:
    """A CUDA device. Its graphs share a memory pool: what one leaves there lasts until another is replayed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def side_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def capture(self, run: Callable[[], T]) -> tuple[Graph, T]:
        torch.cuda.synchronize(self.device)
        gc.collect()  # what is freed while a stream is captured may end the capture
        torch.cuda.empty_cache()
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                return self._captured(run)
        finally:
            if collecting:
                gc.enable()

    def _captured(self, run: Callable[[], T]) -> tuple[Graph, T]:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        spare = generator.clone_state()
        # Threads that load data go on allocating pinned memory, which "global" would forbid them.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            result = run()
        except BaseException:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of a graph that is empty: `run` tells more
                    graph.capture_end()
            except RuntimeError:  # CUDA has ended the capture already
                self._recover(generator, spare)
            raise
        try:
            graph.capture_end()
        except RuntimeError:
            self._recover(generator, spare)
            raise
        return graph, result

    def _recover(self, generator: torch.Generator, spare: torch.Generator) -> None:
        # torch leaves allocator, generator, pool and stream of such a capture as if it were still going on.
        with contextlib.suppress(RuntimeError):  # of a torch that has ended it itself, and released the pool
            memory._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)  # type: ignore[attr-defined]
            memory._cuda_releasePool(torch.cuda.current_device(), self._pool)  # type: ignore[attr-defined]
        generator.graphsafe_set_state(spare)
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    def random_state(self) -> tuple[Tensor, Tensor]:
        return torch.get_rng_state(), torch.cuda.get_rng_state(self.device)

    def set_random_state(self, state: tuple[Tensor, Tensor]) -> None:
        torch.set_rng_state(state[0])
        torch.cuda.set_rng_state(state[1], self.device)
