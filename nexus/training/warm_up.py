"""Warm-up and capture of a train step, of which nothing is left but the graph."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nexus.training.captured_graph import CapturedGraph
from nexus.training.gradients import Gradients
from nexus.training.graph_device import GraphDevice
from nexus.training.inspection import Inspector
from nexus.training.rollback import HostState, StateBefore, attached_schedulers
from nexus.training.safety import named_parameters
from nexus.training.signature import read_outputs

_WARNED = "_warned_capturable_if_run_uncaptured"


def capture_after_warm_up(
    run: Callable[[], Any], optimizer: Optimizer, inputs: list[Tensor], device: GraphDevice, warmup: int
) -> CapturedGraph:
    """A graph of `run`, which trains on `inputs`. Everything is then as it was before.

    Raises:
        RuntimeError: it cannot be captured; with cause and remedy.
        BaseException: whatever `run` raises.
    """
    schedulers = attached_schedulers(optimizer)
    state = StateBefore(optimizer)
    host = HostState(optimizer, schedulers)
    random_state = device.random_state()
    gradients = Gradients([(name, param) for name, param in named_parameters(optimizer) if param.requires_grad])
    inspector = Inspector(device.device, [*_rates(optimizer), *_counters(schedulers)])
    try:
        try:
            with _no_warning_of_capturable(optimizer):
                _warm_up(run, device, warmup, gradients, inspector, host)
        finally:
            inspector.restore()
            state.restore()
            host.restore()
            gradients.restore()
            device.set_random_state(random_state)
        try:
            gradients.before_capture()
            torch.clear_autocast_cache()
            graph, outputs = device.capture(lambda: read_outputs(run()))
            refusal = host.refusal()
            if refusal is not None:
                raise RuntimeError(refusal)
            advances = host.advances()
        finally:
            torch.clear_autocast_cache()
            host.restore()
            gradients.after_capture()
            device.set_random_state(random_state)
    except BaseException:
        state.forget_new()
        raise
    return CapturedGraph(graph, optimizer, inputs, outputs, gradients, advances)


def _warm_up(
    run: Callable[[], Any],
    device: GraphDevice,
    warmup: int,
    gradients: Gradients,
    inspector: Inspector,
    host: HostState,
) -> None:
    with device.side_stream():
        for index in range(warmup):
            torch.clear_autocast_cache()
            if index == 0:
                with gradients.watching(), _compiled_code_off(), inspector:
                    read_outputs(run())
                inspector.end_first_run()
                refusal = host.refusal() or gradients.refusal()
            elif index < warmup - 1:
                run()
            else:
                inspector.check()
                with _compiled_code_off(), inspector:
                    run()
                refusal = inspector.refusal
            if refusal is not None:
                raise RuntimeError(f"the train step cannot be captured: {refusal}")


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


def _compiled_code_off() -> contextlib.AbstractContextManager[Any]:
    """Code from torch.compile does not show what it does; what it was compiled from does."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _rates(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        for value in group.values():
            if isinstance(value, Tensor):
                yield value


def _counters(schedulers: list[Any]) -> Iterator[Tensor]:
    for scheduler in schedulers:
        rates = getattr(scheduler, "_device_rates", None)
        if rates is not None:
            yield rates.counter
