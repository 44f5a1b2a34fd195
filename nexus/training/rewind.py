"""Go back to where a run was before some training steps, bit for bit, in the memory that graphs point to."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nexus.backends.sharding import local
from nexus.optim import FusedAdamW
from nexus.optim.engine import Engine, attributes_of, engine_of
from nexus.optim.groups import ParamGroup
from nexus.optim.parameters import is_trained, named_parameters
from nexus.optim.state import complete_states
from nexus.optim.storage import storage_of


@contextlib.contextmanager
def rewinding(optimizer: FusedAdamW, model: nn.Module | None) -> Iterator[None]:
    """Put back at the end, also after an error, all that training steps in between have changed.

    That is: parameters and gradients, of the optimizer and of `model`; buffers of `model`; state, counters, settings,
    schedules, clocks and history of the optimizer; random numbers of torch, Python and NumPy.
    """
    engine, attributes = engine_of(optimizer), attributes_of(optimizer)
    engine.settle(attributes)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    params = list(dict.fromkeys([*params, *(() if model is None else model.parameters())]))
    with _random_numbers(params):
        modules = () if model is None else model.modules()
        buffers = [_Attributes(module._buffers) for module in modules]
        groups = _Settings(optimizer.param_groups)
        kept: list[_Kept] = [_Values(params), _Gradients(params), _State(optimizer), groups, *buffers]
        kept.append(_DeviceMemory(engine))
        try:
            yield
        finally:
            for each in kept:
                each.put_back()
            engine.forget_plan()
            if _has_captured(engine):
                optimizer.sync_hyperparameters()


@contextlib.contextmanager
def _random_numbers(params: list[Tensor]) -> Iterator[None]:
    devices = {param.device for param in params if param.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy is not None:
                numpy.random.set_state(states[1])


def _has_captured(engine: Engine) -> bool:
    return engine.runner is not None and engine.runner.has_captured()


class _Kept(Protocol):
    def put_back(self) -> None: ...


class _Values:
    """The values of tensors, in their memory."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._values = [(tensor, local(tensor).detach().clone()) for tensor in tensors if not tensor.is_meta]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in self._values:
            local(tensor).detach().copy_(value)


class _Gradients:
    def __init__(self, params: list[Tensor]) -> None:
        self._gradients = [(param, param.grad) for param in params]
        self._values = _Values(grad for _, grad in self._gradients if grad is not None)

    def put_back(self) -> None:
        for param, grad in self._gradients:
            if param.grad is not grad:
                param.grad = grad
        self._values.put_back()


class _Attributes:
    """A dict, or the attributes of an object: which they are, and the values of those that are tensors."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes
        self._kept = {
            name: copy.copy(value) if isinstance(value, (list, dict)) else value for name, value in attributes.items()
        }
        self._values = _Values(value for value in self._kept.values() if isinstance(value, Tensor))

    def put_back(self) -> None:
        self._attributes.clear()
        self._attributes.update(self._kept)
        self._values.put_back()


class _Settings:
    """What param_groups say. A rate that a schedule shows is written as a step does, and so is not the user's."""

    def __init__(self, groups: list[ParamGroup]) -> None:
        self._groups = groups
        self._list = list(groups)
        self._items = [dict(group) for group in groups]
        self._outputs = [dict(group.outputs) for group in groups]
        self._shown = [{name: output.clone() for name, output in group.outputs.items()} for group in groups]
        shown = {id(output) for outputs in self._outputs for output in outputs.values()}
        params = {id(param) for group in groups for param in group["params"]}
        given = [value for value in tree_leaves(self._items) if isinstance(value, Tensor)]  # also one of the betas
        self._values = _Values(value for value in given if id(value) not in shown | params)

    def put_back(self) -> None:
        self._groups[:] = self._list
        for group, items, outputs, shown in zip(self._list, self._items, self._outputs, self._shown, strict=True):
            dict.clear(group)  # not by the group's own methods, which look for a second driver of the rate
            group.outputs = outputs
            group.update(items)
            for name, value in shown.items():
                group.show(name, value)
        self._values.put_back()


class _State:
    """The state of every parameter. What graphs write to stays, with the values that it had."""

    def __init__(self, optimizer: FusedAdamW) -> None:
        self._optimizer = optimizer
        self._states = {
            key: dict(state) if isinstance(state, dict) else state for key, state in optimizer.state.items()
        }
        self._values = {
            key: {name: local(value).detach().clone() for name, value in state.items() if isinstance(value, Tensor)}
            for key, state in self._states.items()
            if isinstance(state, dict)
        }

    def put_back(self) -> None:
        own, stays = self._optimizer.state, _has_captured(engine_of(self._optimizer))
        begun = [key for key in own if not self._states.get(key)]
        fresh = self._fresh(set(begun)) if stays else {}
        for key in begun:
            if key in fresh:
                _put_back_state(own[key], fresh[key], {name: local(value) for name, value in fresh[key].items()})
            else:
                del own[key]
        for key, state in self._states.items():
            if key in self._values:
                if key not in fresh:
                    _put_back_state(own[key], state, self._values[key])
            else:
                own[key] = state

    def _fresh(self, keys: set[Any]) -> dict[Any, dict[str, Any]]:
        """The state that these parameters begin with."""
        groups = self._optimizer.param_groups
        begun: dict[Any, dict[str, Any]] = {}
        for index, param, name in named_parameters(groups):
            if param in keys and is_trained(param):
                begun[param] = {}
                complete_states([(begun[param], param, name, storage_of(param, groups[index], name))])
        return begun


@torch.no_grad()
def _put_back_state(own: dict[str, Any], then: dict[str, Any], values: dict[str, Tensor]) -> None:
    for name in [name for name in own if name not in then]:
        del own[name]
    for name, value in then.items():
        now = own.get(name)
        if name not in values:
            own[name] = value
            continue
        if not isinstance(now, Tensor) or now.shape != value.shape or now.dtype != value.dtype:
            now = own[name] = value
        local(now).detach().copy_(values[name])


class _DeviceMemory:
    """What an engine has on its devices: counters, tables, clocks, the history."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._states, self._tables = dict(engine.states), dict(engine.tables)
        self._clocks = {clock: dict(devices) for clock, devices in engine.clocks.kept.items()}
        owners: list[Any] = [*self._states.values(), *self._tables.values(), *engine.clocks.every()]
        if engine.history is not None:
            owners += [engine.history, engine.history._ring]
        self._kept = [_Attributes(vars(owner)) for owner in owners]

    def put_back(self) -> None:
        self._engine.states, self._engine.tables = self._states, self._tables
        self._engine.clocks.kept = self._clocks
        for each in self._kept:
            each.put_back()
