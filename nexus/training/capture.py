"""A whole training step (forward, backward, clipping, schedule, update) as one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from typing import Generic, ParamSpec, TypeVar

import torch
from torch.optim import Optimizer

from nexus.arguments import check_count, shown
from nexus.training import graph_device
from nexus.training.captured_graph import CapturedGraph
from nexus.training.graph_device import GraphDevice
from nexus.training.safety import check_capturable
from nexus.training.signature import Inputs, read_inputs, read_outputs
from nexus.training.warm_up import capture_after_warm_up

__all__ = ["CapturedStep", "capture_train_step"]

P = ParamSpec("P")
R = TypeVar("R")


def capture_train_step(
    train_step: Callable[P, R],
    optimizer: Optimizer,
    *,
    warmup: int = 3,
    max_graphs: int = 8,
    clone_outputs: bool = False,
) -> CapturedStep[P, R]:
    r"""Make one CUDA graph of a training step: forward, backward, clipping, schedule and update.

    On CUDA, the first call with inputs of a kind runs `train_step` a few times to warm up, undoes that, captures a
    graph, and replays it; later calls copy their inputs into the graph's and replay it. After N calls, everything
    is as after N plain steps. Elsewhere, each call runs `train_step` itself.

    Args:
        train_step: any function of tensors, or of trees of them (tuples, lists, dicts), that trains on them and
            returns a tensor, a tree of tensors, or nothing. What else it is given, such as a number or a string,
            must be hashable: there is a graph for each value.
        optimizer: what `train_step` steps: a `FusedAdamW`, or an optimizer of torch's with `capturable=True`.
        warmup: runs before each capture, from 3. In the first, the step is watched for what it writes; in the
            last, for what cannot be captured.
        max_graphs: graphs that are kept, from 1, one for each kind of inputs (tree, shapes, strides, dtypes,
            constants; autocast). One more takes the place of the one that was made first.
        clone_outputs: return copies. Otherwise, the tensors returned are overwritten by the next call.

    Returns:
        A callable with the signature of `train_step`. Tensors that it returns have no gradient function.

    Raises:
        TypeError, ValueError: here, an argument that is not allowed. In a call, an input or an output that a graph
            cannot take or give, named.
        RuntimeError: in a call, what cannot be captured, with cause and remedy. Everything is as before the call,
            as it is when `train_step` itself raises in warm-up or capture.

    >>> import torch
    >>> from nexus.optim import FusedAdamW
    >>> from nexus.schedules import WSD
    >>> from nexus.training import capture_train_step
    >>> device = "cuda" if torch.cuda.is_available() else "cpu"
    >>> model = torch.nn.Linear(4, 1, device=device)
    >>> schedule = WSD(warmup_steps=10, stable_steps=100, decay_steps=20, peak_lr=1e-2)
    >>> optimizer = FusedAdamW(model.parameters(), lr=schedule, max_grad_norm=1.0)
    >>> def train_step(x, y):
    ...     optimizer.zero_grad()
    ...     loss = (model(x) - y).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> step = capture_train_step(train_step, optimizer)
    >>> for _ in range(20):
    ...     x = torch.randn(8, 4)
    ...     loss = step(x, x.sum(1, keepdim=True))
    >>> optimizer.param_groups[0]["lr"].item() == schedule(19)
    True
    """
    if not callable(train_step):
        raise TypeError(f"train_step must be callable, got {shown(train_step)}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}")
    check_count("warmup", warmup, low=3)
    check_count("max_graphs", max_graphs, low=1)
    if not isinstance(clone_outputs, bool):
        raise TypeError(f"clone_outputs must be a bool, got {shown(clone_outputs)}")
    return CapturedStep(train_step, optimizer, warmup, max_graphs, clone_outputs)


class CapturedStep(Generic[P, R]):
    """What `capture_train_step` returns."""

    def __init__(
        self, train_step: Callable[P, R], optimizer: Optimizer, warmup: int, max_graphs: int, clone_outputs: bool
    ) -> None:
        self._train_step = train_step
        self._optimizer = optimizer
        self._warmup = warmup
        self._max_graphs = max_graphs
        self._clone_outputs = clone_outputs
        self._graphs: dict[Hashable, CapturedGraph] = {}
        self._device: GraphDevice | None = None
        self._has_evicted = False

    @property
    def graph_count(self) -> int:
        """Graphs that are kept; 0 where steps run eagerly."""
        return len(self._graphs)

    def reset(self) -> None:
        """Let go of all graphs and their memory. The next call captures anew."""
        self._graphs.clear()
        self._device = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        inputs = read_inputs(args, kwargs)
        device = self._graph_device()
        if device is None:
            outputs = read_outputs(self._train_step(*args, **kwargs))
            value: R = outputs.value(self._clone_outputs)
            return value
        signature = (inputs.signature, _surroundings(device.device))
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._capture(device, inputs)
            if len(self._graphs) == self._max_graphs:
                self._evict()
            self._graphs[signature] = graph
        else:
            graph.check_unchanged()
        outputs = graph.replay(inputs.tensors)
        value = outputs.value(self._clone_outputs)
        return value

    def _graph_device(self) -> GraphDevice | None:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if self._device is None or self._device.device != param.device:
                    if self._graphs:
                        raise RuntimeError(
                            f"the parameters were moved to {param.device}, and graphs of them on "
                            f"{self._device.device if self._device else 'another device'} have been captured: call "
                            "reset() on the captured step"
                        )
                    self._device = graph_device.graph_device(param.device)
                return self._device
        return None

    def _capture(self, device: GraphDevice, inputs: Inputs) -> CapturedGraph:
        check_capturable(self._optimizer, device.device)
        static = [torch.empty_like(tensor, device=device.device).copy_(tensor) for tensor in inputs.tensors]
        args, kwargs = inputs.arguments(static)
        return capture_after_warm_up(
            lambda: self._train_step(*args, **kwargs), self._optimizer, static, device, self._warmup
        )

    def _evict(self) -> None:
        del self._graphs[next(iter(self._graphs))]
        if not self._has_evicted:
            self._has_evicted = True
            warnings.warn(
                f"inputs of more than max_graphs={self._max_graphs} kinds: the graph that was made first is dropped, "
                "and will be captured again when its inputs come again. Pad inputs to fewer shapes, or give "
                "capture_train_step a larger max_graphs. This is said once",
                RuntimeWarning,
                stacklevel=3,
            )


def _surroundings(device: torch.device) -> Hashable:
    """What else a step depends on that a caller may set around a call."""
    autocast = torch.is_autocast_enabled(device.type)
    return (
        autocast and torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
