"""CUDA graphs without a GPU, for processes that train together: collectives are recorded and repeated, too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import graphs_on_cpu
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.utils._pytree import tree_map

from nexus.training.capture import device as graph_device


class _Recorder(graphs_on_cpu._Recorder):
    """Looks into DTensors, and lets a replay wait for its collectives, which no stream orders here.

    A graph has memory of its own for what FSDP2 frees between steps: a replay brings that back.
    """

    def __init__(self, graph: graphs_on_cpu.Graph) -> None:
        super().__init__(graph)
        self.sizes: dict[int, tuple[torch.UntypedStorage, int]] = {}
        graph.work.append(self.bring_back)

    def keep(self, tensor: Tensor) -> None:
        super().keep(tensor)
        storage = tensor.untyped_storage()
        self.sizes[storage._cdata] = storage, max(storage.nbytes(), self.sizes.get(storage._cdata, (storage, 0))[1])

    def bring_back(self) -> None:
        for storage, size in self.sizes.values():
            if storage.nbytes() < size:
                storage.resize_(size)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            func = _waiting(func)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _waiting(func: Any) -> Callable[..., Any]:
    def wait(leaf: Any) -> Any:
        if not isinstance(leaf, torch.ScriptObject):
            return torch.ops._c10d_functional.wait_tensor(leaf) if func.namespace == "_c10d_functional" else leaf
        dist.Work.unbox(leaf).wait()
        return FakeWork().boxed()  # whoever waits again finds nothing to do: gloo copies results there

    return lambda *args, **kwargs: tree_map(wait, func(*args, **kwargs))


class Graphs(graphs_on_cpu.Graphs):
    recorder = _Recorder

    def capture(self, run: Callable[[], Any]) -> tuple[graphs_on_cpu.Graph, Any]:
        # What FSDP2 frees stays in the pool of the graph, where replays find it.
        with mock.patch.object(_fsdp_param, "free_storage"):
            return super().capture(run)


@contextmanager
def graphs() -> Iterator[None]:
    """Lets steps on the CPU be captured."""
    with mock.patch.object(graph_device, "graph_device", return_value=Graphs()):
        yield
