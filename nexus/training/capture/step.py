"""A whole training step (forward, backward, clipping, schedule, update) as one CUDA graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator
from operator import is_
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from nexus.arguments import check_count, shown
from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, engine_of
from nexus.optim.parameters import named_parameters
from nexus.training.capture import device as graph_device
from nexus.training.capture.device import GraphDevice
from nexus.training.capture.gradients import Gradients
from nexus.training.capture.graph import CapturedGraph
from nexus.training.capture.host import HostState, check_capturable
from nexus.training.capture.inspection import Inspector
from nexus.training.capture.signature import Inputs, Outputs, read_inputs, read_outputs

_WARNED = "_warned_capturable_if_run_uncaptured"

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

    On CUDA, the first calls with inputs of a kind are plain steps, on a stream of their own. The next one captures
    the step, which trains nothing, and replays the graph; later ones copy their inputs into the graph's and replay
    it. So after N calls, everything is as after N plain steps. Elsewhere, each call is a plain step.

    Args:
        train_step: any function of tensors, or of trees of them (tuples, lists, dicts), that trains on them and
            returns a tensor, a tree of tensors, or nothing. What else it is given, such as a number or a string,
            must be hashable: there is a graph for each value.
        optimizer: what `train_step` steps: a `FusedAdamW`, or an optimizer of torch's with `capturable=True`.
        warmup: plain steps before each capture, from 2: the first makes what is made once, such as the state; the
            last is watched for what cannot be captured.
        max_graphs: graphs that are kept, from 1, one for each kind of inputs (tree, shapes, strides, dtypes,
            constants; autocast). One more takes the place of the one that was made first.
        clone_outputs: return copies. Otherwise, the tensors returned are overwritten by the next call.

    Returns:
        A callable with the signature of `train_step`. Tensors that it returns have no gradient function.

    Raises:
        TypeError, ValueError: here, an argument that is not allowed. In a call, an input or an output that a graph
            cannot take or give, named.
        RuntimeError: in a call, what cannot be captured, with cause and remedy; that call was a plain step. An error
            of `train_step` is raised as it is, and leaves what a plain step leaves.

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
    try:
        check_count("warmup", warmup, low=2)
    except ValueError as error:
        raise ValueError(
            f"{error}: the first plain step makes the state, and the last is watched for what no graph can hold. "
            "Leave it out for 3"
        ) from None
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
        self._kinds: dict[Hashable, _Kind] = {}
        self._device: GraphDevice | None = None
        self._has_evicted = False

    @property
    def graph_count(self) -> int:
        """Graphs that are kept; 0 where steps run eagerly."""
        return sum(kind.graph is not None for kind in self._kinds.values())

    def reset(self) -> None:
        """Let go of all graphs and their memory. The next calls are plain steps again, and capture anew."""
        self._kinds.clear()
        self._device = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        inputs = read_inputs(args, kwargs)
        device = self._graph_device()
        if device is None:
            outputs = read_outputs(self._train_step(*args, **kwargs))
            value: R = outputs.value(self._clone_outputs)
            return value
        signature = (inputs.signature, _surroundings(device.device))
        kind = self._kinds.get(signature)
        if kind is None or not (kind.graph or kind.has_parameters_of(self._optimizer)):
            check_capturable(self._optimizer, device.device)
            if kind is None and len(self._kinds) == self._max_graphs:
                self._evict()
            kind = self._kinds[signature] = _Kind(self._optimizer)
        if kind.graph is None and kind.steps < self._warmup:
            outputs = kind.step_plainly(self._train_step, inputs, device, last=kind.steps == self._warmup - 1)
        else:
            if kind.graph is None:
                kind.capture(self._train_step, inputs, device)
            outputs = kind.replay(inputs)
        value = outputs.value(self._clone_outputs)
        return value

    def _graph_device(self) -> GraphDevice | None:
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if self._device is None or self._device.device != param.device:
                    if self.graph_count:
                        raise RuntimeError(
                            f"the parameters were moved to {param.device}, and graphs of them on "
                            f"{self._device.device if self._device else 'another device'} have been captured: call "
                            "reset() on the captured step"
                        )
                    self._device = graph_device.graph_device(param.device)
                return self._device
        return None

    def _evict(self) -> None:
        del self._kinds[next(iter(self._kinds))]
        if not self._has_evicted:
            self._has_evicted = True
            warnings.warn(
                f"inputs of more than max_graphs={self._max_graphs} kinds: what was captured first is dropped, "
                "and will be captured again when its inputs come again. Pad inputs to fewer shapes, or give "
                "capture_train_step a larger max_graphs. This is said once",
                RuntimeWarning,
                stacklevel=3,
            )


class _Kind:
    """Inputs of one kind: plain steps first, then a graph."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.graph: CapturedGraph | None = None
        self.steps = 0  # made plainly
        self._optimizer = optimizer
        self._params = _parameters(optimizer)
        named = named_parameters(optimizer.param_groups)
        self._gradients = Gradients([(name, param) for _, param, name in named if param.requires_grad])

    def has_parameters_of(self, optimizer: Optimizer) -> bool:
        """Whether the plain steps can go on. A graph says itself what has become of its parameters."""
        params = _parameters(optimizer)
        return len(params) == len(self._params) and all(map(is_, params, self._params))

    def step_plainly(
        self, train_step: Callable[..., Any], inputs: Inputs, device: GraphDevice, *, last: bool
    ) -> Outputs:
        """Make a plain step, and see what it does; the last one is inspected.

        Raises:
            RuntimeError: the step, which was made, cannot be captured; with cause and remedy.
        """
        host = HostState(self._optimizer)
        inspector = Inspector(device.device, host.rates()) if last else None
        args, kwargs = inputs.arguments([tensor.to(device.device) for tensor in inputs.tensors])
        with device.side_stream(), _no_warning_of_capturable(self._optimizer), self._gradients.watching():
            torch.clear_autocast_cache()
            with inspector or contextlib.nullcontext():
                result = train_step(*args, **kwargs)
            outputs = read_outputs(result)
        refusal = host.refusal() or self._gradients.refusal() or (inspector and inspector.refusal)
        if refusal:
            raise RuntimeError(f"the train step cannot be captured: {refusal}")
        self.steps += 1
        return outputs

    def capture(self, train_step: Callable[..., Any], inputs: Inputs, device: GraphDevice) -> None:
        """Capture the step, which trains nothing; whatever comes of it, all is as it was before.

        Raises:
            RuntimeError: it cannot be captured; with cause and remedy.
            BaseException: whatever `train_step` raises.
        """
        capturing = _capturing(self._optimizer)
        static = [torch.empty_like(tensor, device=device.device).copy_(tensor) for tensor in inputs.tensors]
        args, kwargs = inputs.arguments(static)
        host, random_state = HostState(self._optimizer), device.random_state()
        host.prepare_schedulers()
        torch.clear_autocast_cache()
        try:
            with capturing as tables, self._gradients.captured():
                graph, outputs = device.capture(lambda: read_outputs(train_step(*args, **kwargs)))
            refusal = host.refusal()
            if refusal is not None:
                raise RuntimeError(refusal)
            advances = host.advances()
        finally:
            torch.clear_autocast_cache()
            host.restore()
            device.set_random_state(random_state)
        self.graph = CapturedGraph(graph, self._optimizer, tables, static, outputs, self._gradients, advances)

    def replay(self, inputs: Inputs) -> Outputs:
        """Make a step by the graph."""
        assert self.graph is not None
        return self.graph.replay(inputs.tensors)


def _capturing(optimizer: Optimizer) -> contextlib.AbstractContextManager[list[object]]:
    """What keeps, for a graph, what it reads of an optimizer."""
    if isinstance(optimizer, FusedAdamW):
        engine = engine_of(optimizer)
        engine.follow_changes(attributes_of(optimizer))  # so that nothing of it becomes a part of each replay
        if engine.runner is not None:
            return engine.runner.capturing()
    return contextlib.nullcontext([])


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@contextlib.contextmanager
def _no_warning_of_capturable(optimizer: Optimizer) -> Iterator[None]:
    """Torch warns of an optimizer that could be captured and is not. It will be."""
    warned = vars(optimizer).get(_WARNED)
    vars(optimizer)[_WARNED] = True
    try:
        yield
    finally:
        vars(optimizer).pop(_WARNED)
        if warned is not None:
            vars(optimizer)[_WARNED] = warned


def _surroundings(device: torch.device) -> Hashable:
    """What else a step depends on that a caller may set around a call."""
    autocast = torch.is_autocast_enabled(device.type)
    return (
        autocast and torch.get_autocast_dtype(device.type),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )
