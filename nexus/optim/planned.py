"""An optimizer's groups, schedules and device memory, and the plan that a step makes of them for its backend."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.optimizer import Optimizer

from nexus import backends
from nexus.arguments import shown
from nexus.backends import estimate, reference
from nexus.backends.interface import Backend, Change, DevicePlan, Plan, Runner, StepState, TensorEntry
from nexus.optim import tensor_list
from nexus.optim.history import History
from nexus.optim.param_group import SCHEDULABLE, WATCHED_NAMES, ParamGroup, check_group, settings_of
from nexus.optim.shards import norm_parts
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

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """As in torch: what has been done for each parameter. The step after a read looks at all of it."""
        attributes = self.__dict__
        try:
            state: defaultdict[Tensor, Any] = attributes["state"]
        except KeyError:
            raise AttributeError("this optimizer has no state yet") from None
        attributes["_state_reads"] = attributes.get("_state_reads", 0) + 1  # behind which a reference is counted
        runner = attributes.get("_runner")
        if runner is not None:
            runner.release_state()  # what is deleted from it is to be freed at once
        return state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value

    def _unwrapped(self) -> PlannedOptimizer:
        """The optimizer itself, also where `self` is a wrapper of Lightning's.

        Such a wrapper is made to be of this class, has its methods and reads the optimizer's attributes; what is
        assigned to it, the optimizer never sees.
        """
        optimizer = vars(self).get("_optimizer")
        return optimizer if isinstance(optimizer, PlannedOptimizer) else self

    @torch.inference_mode(False)  # what is made here outlives a mode in which a step may be
    def _prepare(self, change: int = Change.TENSORS) -> Runner:
        """Bring the plan up to date with whatever the user has done since the last step, a `Change`."""
        if self._unwrapped() is not self:
            return self._unwrapped()._prepare(change)
        self._tidy_groups()  # before an iterator is gone through
        if any(isinstance(param, FakeTensor) for group in self.param_groups for param in group["params"]):
            backend = cast(Backend, estimate)
        else:
            backend = backends.select(self._requested_backend, self._devices())
        if self._runner is None or backend is not self._backend:
            self._backend, self._plan = backend, None
            self._runner = backend.runner(WATCHED_NAMES)
        if self._plan is not None and change == Change.SETTINGS:
            self._settle_groups()
            self._check_scales()
            if [group["amsgrad"] for group in self.param_groups] == self._planned_amsgrad:
                for device, device_plan in self._plan.devices.items():
                    self._fill_settings(device_plan, device)
                self._runner.update_settings()
                return self._runner
        self._plan = self._make_plan()
        self._planned_amsgrad = [group["amsgrad"] for group in self.param_groups]
        self._runner.bind(self._plan, self.__dict__)
        return self._runner

    def _make_plan(self) -> Plan:
        self._settle_groups()
        self._check_scales()
        self._check_once()
        named = [each for each in self._named_parameters() if tensor_list.is_trained(each[1])]
        for _, param, name in named:
            tensor_list.check_parameter(param, name)
            tensor_list.check_gradient(param, name)
        tensor_list.check_memory([(name, param) for _, param, name in named])
        tensor_list.check_sharing([(name, param) for _, param, name in named if param.grad is not None])
        self._init_states()
        states = self.state
        devices: dict[torch.device, DevicePlan] = {}
        for device in self._devices():
            devices[device] = DevicePlan(self._state_on(device), [], [], False)
            self._fill_settings(devices[device], device)
        if self._history is not None:
            self._history.attach(next(iter(devices.values())))
        self._states = {device: self._states[device] for device in devices}  # what was left behind goes stale
        self._tables = {key: table for key, table in self._tables.items() if key[1] in devices}
        entries: dict[Tensor, TensorEntry] = {}
        for index, param, name in named:
            if tensor_list.is_complete(states.get(param)) and not tensor_list.is_idle(param, states[param]):
                amsgrad = self.param_groups[index]["amsgrad"]
                entry = tensor_list.make_entry(param, states[param], index, amsgrad=amsgrad, where=name)
                devices[param.device].entries.append(entry)
                entries[param] = entry
        every = [param for group in self.param_groups for param in group["params"]]
        trained = [(param, entries.get(param)) for _, param, _ in named]
        return Plan([(param, entries.get(param)) for param in every], devices, norm_parts(trained, self._norm_group))

    def _init_states(self) -> None:
        """Give every parameter that has a gradient its counter and moments, zero; as torch does, not before."""
        states, starting = self.state, []
        for index, param, name in self._named_parameters():
            state = states.get(param)
            if param.is_meta or not (param.grad is not None or tensor_list.is_complete(state)):
                continue
            if state is None:
                state = states[param] = {}
            elif not isinstance(state, dict):
                raise TypeError(f"{name}: its state must be a dict, got {shown(state)}; del optimizer.state[p]")
            if tensor_list.is_trained(param):
                starting.append((state, param, name, self.param_groups[index]["amsgrad"]))
        tensor_list.complete_states(starting)

    def _fill_settings(self, plan: DevicePlan, device: torch.device) -> None:
        plan.groups = [
            settings_of(group, {name: self._table(s, device).rows for name, s in group.schedules()}, device)
            for group in self.param_groups
        ]
        plan.measures_norm = self._measures_norm

    @torch.inference_mode(False)  # as above
    def _settle_groups(self) -> None:
        """Check every group, and install the schedules that were assigned to one."""
        self._tidy_groups()
        changed = [group for group in self.param_groups if not group.is_settled()]
        for group in changed:
            group.setdefault("lr_scale", 1.0)
            check_group(group)
            group.tidy()
        scheduled = [group for group in self.param_groups if group.outputs]
        if not changed and not scheduled:
            return
        users = Counter(schedule for group in self.param_groups for _, schedule in group.schedules())
        device = self._devices()[0]
        for group in [*changed, *(group for group in scheduled if group.is_settled())]:
            self._settle_group(group, users, device)
            group.mark_settled()
        for key in [key for key in self._tables if not users[key[0]]]:
            del self._tables[key]  # in place: also a wrapper may call this, see _unwrapped

    def _tidy_groups(self) -> None:
        """Make lists of what was put there by hand, and groups of ours."""
        if not isinstance(self.param_groups, list):
            self.param_groups = list(self.param_groups)
        for index, group in enumerate(self.param_groups):
            if not isinstance(group, ParamGroup):
                group = self.param_groups[index] = ParamGroup({**self.defaults, **group})
            if not isinstance(group["params"], list):
                group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])

    def _settle_group(self, group: ParamGroup, users: Counter[Schedule], device: torch.device) -> None:
        """Settle one group. `users` counts how many settings each schedule drives; `device` is for an empty group."""
        group.check_outputs()
        on = (param.device for param in group["params"] if tensor_list.is_trained(param) and not param.is_meta)
        device = next(on, device)
        for name in SCHEDULABLE:
            assigned, before = isinstance(group[name], Schedule), group[f"{name}_schedule"]
            schedule = group.settle(name, device)
            if schedule is None:
                continue
            users[before] -= before is not None
            if assigned and not users[schedule]:
                for table in self._tables_of(schedule):
                    table.restore({})  # an equal one, whose decay may have begun, was assigned before
            users[schedule] += 1
            self._show_rate(group, name, schedule)

    def _check_once(self) -> None:
        seen: dict[int, str] = {}
        for _, param, name in self._named_parameters():
            if seen.setdefault(id(param), name) is not name:
                raise ValueError(
                    f"{name} is also {seen[id(param)]}, and would be updated twice in each step. Take it out of one "
                    "of the places in param_groups"
                )

    def _check_scales(self) -> None:
        if all(group.driver is None for group in self.param_groups):
            for group in self.param_groups:
                group.check_scale()

    def _show_rate(self, group: ParamGroup, name: str, schedule: Schedule) -> None:
        """Let a group show the rate of the next update, where no update has shown one yet."""
        output = group.outputs[name]
        rows = self._table(schedule, output.device).rows
        now = reference.evaluate(rows, self._state_on(output.device).completed)
        group.show(name, now * group["lr_scale"] if name == "lr" else now)

    # Device memory: made once for each device, and followed when the parameters move.

    def _devices(self) -> list[torch.device]:
        # What is on the meta device is to come to another: until then it is nowhere.
        params = [param for group in self.param_groups for param in group["params"] if not param.is_meta]
        params = [param for param in params if tensor_list.is_trained(param)] or params
        return list(dict.fromkeys(param.device for param in params)) or [torch.device("cpu")]

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
            for source in self._tables_of(schedule)[:1]:
                table.rows.copy_(source.rows)
            self._tables[schedule, device] = table
        return self._tables[schedule, device]

    def _tables_of(self, schedule: Schedule) -> list[ScheduleTable]:
        """Of one schedule, those on each device."""
        return [self._tables[schedule, device] for device in self._states if (schedule, device) in self._tables]

    def _named_parameters(self) -> Iterator[tuple[int, Tensor, str]]:
        """(index of the group, parameter, its name in an error)."""
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names", ())
            for i, param in enumerate(group["params"]):  # of which some may have been added by hand
                yield index, param, f"parameter {names[i] if i < len(names) else i} of group {index}"

    @property
    def _measures_norm(self) -> bool:
        return self._skip_nonfinite or any(group["max_grad_norm"] is not None for group in self.param_groups)
