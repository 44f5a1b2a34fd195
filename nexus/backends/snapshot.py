"""Whether anything of an optimizer has changed since a plan was made of it: for a backend that keeps no pointers."""

from __future__ import annotations

import math
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from nexus.backends.interface import LAST_WRITE, Change, Plan, Rate


class Snapshot:
    """Of an optimizer whose parameters are plain tensors, all that a plan depends on."""

    def __init__(self, plan: Plan, attributes: dict[str, Any], setting_names: tuple[str, ...]) -> None:
        self._setting_names = setting_names
        self._stepped = [param for param, entry in plan.parameters if entry is not None]
        self._others = [param for param, entry in plan.parameters if entry is None]
        self._objects = _objects(attributes)
        self._param_groups: list[dict[str, Any]] = list(attributes["param_groups"])
        states = [attributes["state"][param] for param in self._stepped]
        self._counts = [state["step"] for state in states]
        self._state = [value for each in states for value in each.values() if isinstance(value, Tensor)]
        self._layouts = self._layouts_now()
        self.take_settings(plan)

    @classmethod
    def of(cls, plan: Plan, attributes: dict[str, Any], setting_names: tuple[str, ...]) -> Snapshot | None:
        """None where every step has to look anew: tensors of other kinds, buffers beside them, modes that trace."""
        entries = [entry for _, entry in plan.parameters if entry is not None]
        plain = all(type(param) in (Tensor, Parameter) for param, _ in plan.parameters)
        if not plain or any(entry.staged for entry in entries) or torch._C._len_torch_dispatch_stack():
            return None
        try:
            return cls(plan, attributes, setting_names)
        except RuntimeError:  # a tensor of inference mode counts no version
            return None

    def take_settings(self, plan: Plan) -> None:
        """The hyperparameters of the groups are now those of the plan."""
        self.took_rates = False  # into the plan, and nobody has looked yet
        self._write = LAST_WRITE[0]
        self._settings = self._settings_now()
        self._groups = [each.groups for each in plan.devices.values()]
        groups = [group for each in plan.devices.values() for group in each.groups]
        rates = [value for group in groups for value in group.values() if isinstance(value, Rate)]
        tensors = [each for rate in rates for each in (rate.tensor, rate.host, rate.table, rate.clock)]
        self._read = list({id(each): each for each in tensors if each is not None}.values())
        self._written = [rate.last for rate in rates if rate.last is not None]
        self._places = self._places_now()

    def change(self, attributes: dict[str, Any]) -> Change:
        """What has happened since."""
        if torch._C._len_torch_dispatch_stack() or not _same(_objects(attributes), self._objects):
            return Change.TENSORS
        try:
            if self._layouts_now() != self._layouts:
                return Change.TENSORS
        except RuntimeError:  # of a tensor without memory, such as a sparse gradient
            return Change.TENSORS
        if self._places_now() != self._places:
            return Change.SETTINGS
        if LAST_WRITE[0] is not self._write:
            settings = self._settings_now()
            if not self._take_rates(settings):
                return Change.SETTINGS
            self._settings, self._write = settings, LAST_WRITE[0]
        return Change.NONE

    def _take_rates(self, settings: list[Any]) -> bool:
        """Bring rates into the plan that are plain floats, as torch's schedulers write them; whether that is all."""
        count = len(self._setting_names)
        changed = [at for at, before in enumerate(self._settings) if settings[at] is not before]
        taken: list[tuple[Rate, float]] = []
        for at in changed:
            value, name = settings[at], self._setting_names[at % count]
            rates = [groups[at // count]["lr"] for groups in self._groups]
            plain = all(rate.table is None and rate.tensor is None for rate in rates)
            if name != "lr" or type(value) is not float or not (plain and 0.0 <= value < math.inf):
                return False
            taken += [(rate, value) for rate in rates]
        for rate, value in taken:
            rate.value = value
            self.took_rates = True
        return True

    def _settings_now(self) -> list[Any]:
        return [dict.get(group, name) for group in self._param_groups for name in self._setting_names]

    def _places_now(self) -> list[Any]:
        return [
            [tensor.data_ptr() for tensor in self._read],
            [tensor.dtype for tensor in self._read],
            [tensor._version for tensor in self._written],  # the steps' own writes do not count
        ]

    def _layouts_now(self) -> list[Any]:
        grads = [param.grad for param in self._stepped]
        present = [grad for grad in grads if grad is not None]
        return [
            [grad is None for grad in grads],
            [param.grad is None for param in self._others],
            [param.data_ptr() for param in self._stepped],
            _kinds(self._stepped),
            [grad.data_ptr() != 0 for grad in present],
            _kinds(present),
            [count._version for count in self._counts],  # as above
            [tensor.data_ptr() for tensor in self._state],
            [tensor.shape for tensor in self._state],
            [tensor.stride() for tensor in self._state],
        ]


def _kinds(tensors: list[Tensor]) -> list[Any]:
    """What tensors are but for their elements. Whatever a view or a mode may make of one is in its dispatch keys."""
    return [
        [tensor.dtype for tensor in tensors],
        [tensor.shape for tensor in tensors],
        [tensor.stride() for tensor in tensors],
        [torch._C._dispatch_keys(tensor) for tensor in tensors],
    ]


def _objects(attributes: dict[str, Any]) -> list[Any]:
    groups, state = attributes["param_groups"], attributes["state"]
    objects = [groups, state]
    for group in groups:
        objects += (group, group["params"], *group["params"])
    objects += state
    for each in state.values():
        objects += (each, *each.values()) if isinstance(each, dict) else (each,)
    return objects


def _same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(is_, now, before))
