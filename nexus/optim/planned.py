"""An optimizer's groups, schedules and device memory, and the plan that a step makes of them for its backend."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.optimizer import Optimizer

from nexus import backends
from nexus.backends import reference
from nexus.backends.interface import Backend, Change, DevicePlan, Plan, Runner, StepState, TensorEntry
from nexus.optim import tensor_list
from nexus.optim.history import History
from nexus.optim.param_group import SCHEDULABLE, SETTING_NAMES, ParamGroup, check_group, plain_betas, settings_of
from nexus.optim.shards import is_zero_everywhere, norm_parts
from nexus.schedule_table import ScheduleTable
from nexus.schedules import Schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PlannedOptimizer(Optimizer):
    """What `FusedAdamW` does when something has changed since the last step."""

    param_groups: list[ParamGroup]  # type: ignore[assignment]  # torch says dict, which it is

    _requested_backend: str
    _skip_nonfinite: bool
    _backend: Backend
    _runner: Runner | None
    _plan: Plan | None
    _planned_amsgrad: list[bool]
    _states: dict[torch.device, StepState]
    _tables: dict[tuple[Schedule, torch.device], ScheduleTable]
    _history: History | None = None  # a copy has none
    _norm_group: ProcessGroup | None = None

    def _unwrapped(self) -> PlannedOptimizer:
        """The optimizer itself, also where `self` is a wrapper of Lightning's.

        Such a wrapper is made to be of this class, has its methods and reads the optimizer's attributes; what is
        assigned to it, the optimizer never sees.
        """
        optimizer: PlannedOptimizer = vars(self).get("_optimizer", self)
        return optimizer

    @torch.inference_mode(False)  # what is made here outlives a mode in which a step may be
    def _prepare(self, change: int = Change.TENSORS) -> Runner:
        """Bring the plan up to date with whatever the user has done since the last step, a `Change`."""
        if self._unwrapped() is not self:
            return self._unwrapped()._prepare(change)
        params = (param for group in self.param_groups for param in group["params"])
        # Of a FakeTensor, which has no memory, only what PyTorch does to it can be seen: for estimates of memory.
        fake = any(isinstance(param, FakeTensor) for param in params)
        backend = backends.select(reference.NAME if fake else self._requested_backend, self._devices())
        if self._runner is None or backend is not self._backend:
            self._backend, self._plan = backend, None
            self._runner = backend.runner(self.__dict__, SETTING_NAMES)
        if self._plan is not None and change == Change.SETTINGS:
            self._settle_groups()
            if [group["amsgrad"] for group in self.param_groups] == self._planned_amsgrad:
                for device, device_plan in self._plan.devices.items():
                    self._fill_settings(device_plan, device)
                self._runner.update_settings()
                return self._runner
        self._plan = self._make_plan()
        self._planned_amsgrad = [group["amsgrad"] for group in self.param_groups]
        self._runner.bind(self._plan)
        return self._runner

    def _make_plan(self) -> Plan:
        self._settle_groups()
        named = list(self._named_parameters())
        for _, param, name in named:
            tensor_list.check_parameter(param, name)
            tensor_list.check_gradient(param, name)
        tensor_list.check_memory([(name, param) for _, param, name in named])
        tensor_list.check_sharing([(name, param) for _, param, name in named if not param.is_meta])
        self._init_states()
        devices: dict[torch.device, DevicePlan] = {}
        for device in self._devices():
            devices[device] = DevicePlan(self._state_on(device), [], [], False)
            self._fill_settings(devices[device], device)
        if self._history is not None:
            self._history.attach(next(iter(devices.values())))
        self._states = {device: self._states[device] for device in devices}  # what was left behind goes stale
        self._tables = {key: table for key, table in self._tables.items() if key[1] in devices}
        parameters: list[tuple[Tensor, TensorEntry | None]] = []
        for index, param, name in named:
            entry = None
            if param in self.state and not param.is_meta:
                amsgrad = self.param_groups[index]["amsgrad"]
                entry = tensor_list.make_entry(param, self.state[param], index, amsgrad=amsgrad, where=name)
                devices[param.device].entries.append(entry)
            parameters.append((param, entry))
        return Plan(parameters, devices, norm_parts(parameters, self._norm_group))

    def _only_makes_state(self) -> bool:
        """Whether this step is `torch.distributed.checkpoint`'s, which is to make the state and change nothing.

        To that end it sets every rate to 0, whatever drives it, and every gradient to zeros. Asked where there is no
        state yet.
        """
        if "torch.distributed.checkpoint.state_dict" not in sys.modules:
            return False
        for group in self.param_groups:
            lr = group["lr"]
            is_number = lr.device.type == "cpu" if isinstance(lr, Tensor) else isinstance(lr, float)
            if lr is group.outputs.get("lr") or not is_number or float(lr) != 0.0:
                return False
        params = [param for group in self.param_groups for param in group["params"] if param.requires_grad]
        grads = [param.grad for param in params if param.grad is not None]
        parts = norm_parts([(param, None) for param in params], self._norm_group)
        return len(grads) == len(params) and is_zero_everywhere(grads, parts)

    def _init_states(self) -> None:
        """Give every parameter that has a gradient its counter and moments, zero; as torch does, not before."""
        starting = [
            (param, self.state[param], group["amsgrad"])
            for group in self.param_groups
            for param in group["params"]
            if (param.grad is not None or self.state.get(param)) and not param.is_meta
        ]
        tensor_list.complete_states(starting)

    def _fill_settings(self, plan: DevicePlan, device: torch.device) -> None:
        plan.groups = [
            settings_of(group, {name: self._table(s, device).rows for name, s in group.schedules()}, device)
            for group in self.param_groups
        ]
        plan.measures_norm = self._measures_norm

    def _settle_groups(self) -> None:
        """Check every group, and install the schedules that were assigned to one."""
        for index, group in enumerate(self.param_groups):
            if not isinstance(group, ParamGroup):  # put there without add_param_group
                self.param_groups[index] = ParamGroup({**self.defaults, **group})
            self._settle_group(self.param_groups[index])
        used = self._used_schedules()
        for key in [key for key in self._tables if key[0] not in used]:
            del self._tables[key]  # in place: also a wrapper may call this, see _unwrapped

    def _used_schedules(self, but: ParamGroup | None = None) -> set[Schedule]:
        return {schedule for group in self.param_groups if group is not but for _, schedule in group.schedules()}

    @torch.inference_mode(False)  # as above
    def _settle_group(self, group: ParamGroup) -> None:
        check_group(group)
        if isinstance(group["betas"], list) or isinstance(group["betas"][0], Tensor):
            group["betas"] = plain_betas(group["betas"])
        device = next((param.device for param in group["params"] if not param.is_meta), self._devices()[0])
        for name in SCHEDULABLE:
            assigned = isinstance(group[name], Schedule)
            schedule = group.settle(name, device)
            if schedule is not None:
                if assigned and schedule not in self._used_schedules(but=group):
                    for (other, _), table in self._tables.items():
                        if other == schedule:
                            table.restore({})  # an equal one, whose decay may have begun, was assigned before
                self._show_rate(group, name, schedule)

    def _show_rate(self, group: ParamGroup, name: str, schedule: Schedule) -> None:
        """Let a group show the rate of the next update, where no update has shown one yet."""
        output = group.outputs[name]
        rows = self._table(schedule, output.device).rows
        now = reference.evaluate(rows, self._state_on(output.device).completed)
        output.copy_(now * group["lr_scale"] if name == "lr" else now)

    # Device memory: made once for each device, and followed when the parameters move.

    def _devices(self) -> list[torch.device]:
        params = [param for group in self.param_groups for param in group["params"]]
        # What is on the meta device is to come to another: until then it is nowhere.
        return list(dict.fromkeys(param.device for param in params if not param.is_meta)) or [torch.device("cpu")]

    def _state_on(self, device: torch.device) -> StepState:
        if device not in self._states:
            state = StepState(device, self._skip_nonfinite)
            for other in self._states.values():
                state.completed.copy_(other.completed)
                state.skipped.copy_(other.skipped)
                break
            self._states[device] = state
        return self._states[device]

    def _table(self, schedule: Schedule, device: torch.device) -> ScheduleTable:
        if (schedule, device) not in self._tables:
            table = ScheduleTable(schedule, device)
            for (other, _), source in self._tables.items():
                if other == schedule:
                    table.rows.copy_(source.rows)
                    break
            self._tables[schedule, device] = table
        return self._tables[schedule, device]

    def _named_parameters(self) -> Iterator[tuple[int, Tensor, str]]:
        """(index of the group, parameter, its name in an error)."""
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, param in enumerate(group["params"]):
                yield index, param, f"parameter {names[i] if names else i} of group {index}"

    @property
    def _measures_norm(self) -> bool:
        return self._skip_nonfinite or any(group["max_grad_norm"] is not None for group in self.param_groups)
