"""The step of one parameter of a `FusedAdamW` by itself, before the optimizer's own step ends the update."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus.backends.interface import Change
from nexus.optim.param_group import SETTING_NAMES, ParamGroup
from nexus.optim.planned import PlannedOptimizer
from nexus.schedule_table import ScheduleTable
from nexus.schedules import Schedule

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


class OneParameter(PlannedOptimizer):
    """One parameter in a plan of its own, with the owner's state, settings and schedules.

    Its step does to the parameter what the owner's would, bit for bit: it begins at the owner's count of completed
    updates, which it does not advance. It takes no part in a norm or a history, which are of all parameters.

    Args:
        owner: the optimizer.
        group: of the owner, in which the parameter is.
        param: the parameter.
        name: of the parameter in an error.
    """

    def __init__(self, owner: FusedAdamW, group: ParamGroup, param: Tensor, name: str) -> None:
        # Not torch's: this is no optimizer to anyone but the plan.
        self._owned_by = weakref.ref(owner)  # which keeps this, by way of a handle
        self._group = group
        self._param = param
        self.name = name
        self._requested_backend = owner._requested_backend
        self._skip_nonfinite = False
        self._states = {}
        self._tables = {}
        self._plan = self._runner = None
        self._planned_amsgrad = []
        self.defaults = owner.defaults
        self.state: dict[Tensor, Any] = {}  # type: ignore[assignment]  # torch's makes entries by itself
        self.param_groups = [ParamGroup({**group, "params": [param]})]
        self.param_groups[0].outputs = group.outputs

    @property
    def _owner(self) -> FusedAdamW:
        owner = self._owned_by()
        assert owner is not None
        return owner

    @property
    def group(self) -> ParamGroup:
        """The owner's, in which the parameter is."""
        return self._group

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameter, which has a gradient."""
        self._follow()
        runner = self._runner
        change = Change.TENSORS if runner is None else runner.changed(self.__dict__)
        if runner is None or change:
            runner = self._prepare(change)
        device = self._param.device
        self._state_on(device).completed.copy_(self._owner._state_on(device).completed)
        runner.step(None, None)
        runner.release_state()
        self.state.clear()  # the owner's to free

    step.hooked = True  # type: ignore[attr-defined]

    def _follow(self) -> None:
        """Take over what has been changed in the owner."""
        theirs, mine = self._group, self.param_groups[0]
        for name in SETTING_NAMES:
            if mine[name] is not theirs[name]:
                mine[name] = theirs[name]
        states = self._owner.state
        state = states.get(self._param)
        if state is None:
            state = states[self._param] = {}
        self.state[self._param] = state

    def _settle_groups(self) -> None:
        self._owner._settle_groups()
        self._follow()

    def _table(self, schedule: Schedule, device: torch.device) -> ScheduleTable:
        return self._owner._table(schedule, device)

    def _named_parameters(self) -> Iterator[tuple[int, Tensor, str]]:
        yield 0, self._param, self.name
