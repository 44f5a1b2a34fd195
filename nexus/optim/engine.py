"""What the steps of an optimizer need besides it: settled groups, a plan, and a backend that runs it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from nexus import backends
from nexus.arguments import shown
from nexus.backends import reference
from nexus.backends.interface import (
    RATES,
    Backend,
    Change,
    DevicePlan,
    Glance,
    GroupSettings,
    Plan,
    Rate,
    Runner,
    TensorEntry,
)
from nexus.backends.sharding import norm_parts
from nexus.integrations import distributed_checkpoint
from nexus.optim import onlookers, parameters
from nexus.optim.device_memory import DeviceMemory
from nexus.optim.groups import ParamGroup, settings_of
from nexus.optim.history import History
from nexus.optim.settings import (
    NEWER_SETTINGS,
    SCHEDULABLE,
    STATE_OPTIONS,
    WATCHED_NAMES,
    checked_settings,
    in_state,
    is_limited,
)
from nexus.optim.state import check_streams, complete_states, is_complete, is_idle, make_entry
from nexus.optim.storage import STORAGE_DEFAULTS, keeps_products, storage_of
from nexus.schedules import Schedule
from nexus.schedules.clock import Clocked
from nexus.schedules.table import ScheduleTable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from nexus.optim.fused_adamw import FusedAdamW

Attributes: TypeAlias = dict[str, Any]
"""An optimizer's `__dict__`, of which an engine reads `param_groups`, `state` and `defaults`."""


class Engine(DeviceMemory):
    """Settles the groups of an optimizer, plans its steps and runs them.

    An engine does not refer to its optimizer, which owns it, and is freed when its user lets go of it. So what is
    asked of it comes with the optimizer's `Attributes`; those of a wrapper or of a copy, which share the engine,
    serve as well.

    Args:
        backend: as the user has asked for it.
        skip_nonfinite: whether a step is skipped whose gradients are not finite.
        norm_group: processes with other parameters of the same model.
        seed: of stochastic rounding.
    """

    backend: Backend
    advances = True  # whether a step moves the counters
    shows_averages = False  # whether averages stand in the place of the parameters

    def __init__(
        self, backend: str, *, skip_nonfinite: bool = False, norm_group: ProcessGroup | None = None, seed: int = 0
    ) -> None:
        super().__init__(skip_nonfinite=skip_nonfinite, seed=seed)
        self.requested_backend = backend
        self.norm_group = norm_group
        self.first_ordinal = 0  # of its parameters, in the optimizer
        self.renewed = 0  # how often tables have come to have more layers
        self.history: History | None = None
        self.plan: Plan | None = None
        self.runner: Runner | None = None
        self._planned_options: list[tuple[Any, ...]] = []
        self._in_graphs: list[ScheduleTable] = []  # of plateaus that others have replaced

    def __getstate__(self) -> dict[str, Any]:
        self.check_shows_parameters("a copy of the optimizer")
        # A copy makes a plan of its own, and has no history.
        return {**self.__dict__, "history": None, "plan": None, "runner": None, "backend": None, "_in_graphs": []}

    def select_backend(self, attributes: Attributes) -> None:
        """Choose the backend for the devices on which the parameters are; raises where there is none."""
        self.backend = backends.select(self.requested_backend, devices_of(attributes))

    def step(self, attributes: Attributes, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update every parameter that has a gradient, once."""
        if self.shows_averages:
            self.check_shows_parameters("step()")
        runner = self.runner
        if self.backend is not reference:
            onlookers.refuse_traces()
        change = Change.TENSORS if runner is None else runner.changed(attributes)
        if runner is None or change:
            _tidy(attributes)
            if not attributes["state"] and distributed_checkpoint.is_among_callers(sys._getframe()):
                self._init_states(attributes)
                return
            runner = self.prepare(attributes, change)
        runner.step(grad_scale, found_inf)

    def check_shows_parameters(self, what: str) -> None:
        """Refuse what needs the parameters where `averaged()` has put their averages.

        Raises:
            RuntimeError: `what` is called inside of it.
        """
        if self.shows_averages:
            raise RuntimeError(
                f"{what} within `with optimizer.averaged():`, where the parameters are their averages: leave it first"
            )

    def update_captured(self, attributes: Attributes) -> None:
        """Let graphs that have captured a step see what has changed since."""
        if self.runner is None:
            return  # no step has been made, let alone captured
        self.follow_changes(attributes)
        self.runner.update_captured()

    def follow_changes(self, attributes: Attributes) -> None:
        """Do now what the next step would find to renew, if there was one before."""
        change = Change.NONE if self.runner is None else self.runner.changed(attributes)
        if change:
            self.prepare(attributes, change)

    def prologue(self, attributes: Attributes) -> None:
        """Do what the updates that come next have in common, each by an engine of one of the parameters."""
        if self.runner is not None and self.runner.shares_prologue:
            self.follow_changes(attributes)
            self.runner.prologue()

    def glance(self) -> Glance | None:
        """See `Runner.glance`."""
        return None if self.runner is None else self.runner.glance()

    def release_state(self) -> None:
        """Look at all of the state in the next step, and hold nothing of it until then: it is in a user's hands."""
        if self.runner is not None:
            self.runner.release_state()

    def keep_history(self, attributes: Attributes, capacity: int) -> History:
        """See `FusedAdamW.history`."""
        if self.history is None:
            self.history = History(capacity, devices_of(attributes)[0], len(attributes["param_groups"]))
            self.forget_plan()
        elif capacity != self.history.capacity:
            raise ValueError(
                f"this optimizer has a history of capacity={self.history.capacity}, got {shown(capacity)}; a history "
                "keeps its capacity"
            )
        return self.history

    def forget_plan(self) -> None:
        """Let the next step make a new plan. The runner stays: graphs that have captured a step read its tables."""
        self.plan = None
        if self.runner is not None:
            self.runner.forget()

    @torch.inference_mode(False)  # what is made here outlives a mode in which a step may be
    def prepare(self, attributes: Attributes, change: int = Change.TENSORS) -> Runner:
        """Bring the plan up to date with whatever the user has done since the last step, a `Change`."""
        try:
            return self._renewed(attributes, change)
        except BaseException:
            self.forget_plan()  # state may be half renewed, and a user who mends what is wrong may replace more
            raise

    def _renewed(self, attributes: Attributes, change: int) -> Runner:
        _tidy(attributes)  # before an iterator is gone through
        groups = attributes["param_groups"]
        if any(isinstance(param, FakeTensor) for group in groups for param in group["params"]):
            onlookers.refuse_traces()  # of an estimate, too: it has no update
            backend = cast(Backend, reference)  # which estimates
        else:
            onlookers.refuse_fake_mode()
            backend = backends.select(self.requested_backend, devices_of(attributes))
        if self.runner is None or backend is not self.backend:
            self.backend, self.plan = backend, None
            self.runner = backend.runner(WATCHED_NAMES)
        self.settle(attributes)
        _check_scales(groups)
        options = _planned(groups)
        if self.plan is not None and change == Change.SETTINGS and options == self._planned_options:
            for device, device_plan in self.plan.devices.items():
                self.fill_settings(device_plan, groups, device)
            self.runner.update_settings()
        else:
            self.check_kept(groups)
            self.plan = self.make_plan(attributes)
            self._planned_options = options
            self.runner.bind(self.plan, attributes)
        return self.runner

    def check_kept(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Refuse settings with which state would be stored otherwise where graphs write to it as it is.

        Raises:
            RuntimeError: with the remedy.
        """
        if self._planned_options and self.runner is not None and self.runner.has_captured():
            _check_kept(_planned(groups), self._planned_options)

    def make_plan(self, attributes: Attributes) -> Plan:
        """A plan of settled groups, once all that a step works on is there and fits."""
        groups = attributes["param_groups"]
        self._check_once(groups)
        every = list(self.named_parameters(groups))
        ordinals = {param: self.first_ordinal + place for place, (_, param, _) in enumerate(every)}
        named = [each for each in every if parameters.is_trained(each[1])]
        for _, param, name in named:
            parameters.check_parameter(param, name)
            parameters.check_gradient(param, name)
        storages = {param: storage_of(param, groups[index], name) for index, param, name in named}
        parameters.check_memory([(name, param) for _, param, name in named])
        parameters.check_sharing([(name, param) for _, param, name in named if param.grad is not None])
        self.release_state()
        self._init_states(attributes)
        states = attributes["state"]
        devices: dict[torch.device, DevicePlan] = {}
        for device in devices_of(attributes):
            devices[device] = DevicePlan(self.state_on(device), [], [], False, advances=self.advances)
            self.fill_settings(devices[device], groups, device)
        if self.history is not None:
            self.history.attach(next(iter(devices.values())))
        self.keep(list(devices))
        entries: dict[Tensor, TensorEntry] = {}
        used = [each for each in named if is_complete(states.get(each[1])) and not is_idle(each[1], states[each[1]])]
        for _, param, name in used:
            check_streams(states[param], storages[param], param, name)
        for index, param, _ in used:
            entry = make_entry(param, states[param], index, ordinals[param], storages[param])
            devices[param.device].entries.append(entry)
            entries[param] = entry
        trained = [(param, entries.get(param)) for _, param, _ in named]
        every_entry = [(param, entries.get(param)) for _, param, _ in every]
        return Plan(every_entry, devices, norm_parts(trained, self.norm_group))

    def _init_states(self, attributes: Attributes) -> None:
        """Give every parameter that has a gradient its counter and moments, zero; as torch does, not before."""
        states, groups, starting = attributes["state"], attributes["param_groups"], []
        for index, param, name in self.named_parameters(groups):
            state = states.get(param)
            if param.is_meta or not (param.grad is not None or is_complete(state)):
                continue
            if state is None:
                state = states[param] = {}
            elif not isinstance(state, dict):
                raise TypeError(f"{name}: its state must be a dict, got {shown(state)}; del optimizer.state[p]")
            if parameters.is_trained(param):
                starting.append((state, param, name, storage_of(param, groups[index], name)))
        complete_states(starting)

    def fill_settings(self, plan: DevicePlan, groups: list[ParamGroup], device: torch.device) -> None:
        """Give a plan the settings of settled groups."""
        plan.groups = [
            settings_of(group, {name: self.table(s, device).rows for name, s in group.schedules()}, device)
            for group in groups
        ]
        rates = [(settings, name, settings[name]) for settings in plan.groups for name in RATES]
        written = {id(rate.last): (settings, name) for settings, name, rate in rates if rate.last is not None}
        for settings, name, rate in rates:
            if id(rate.tensor) in written:  # what the step itself writes, and would be read before that or after it
                _share_schedule(settings, name, *written[id(rate.tensor)])
        self._set_clocks(plan, groups, device)
        plan.measures_norm = self.measures_norm(groups)

    def _set_clocks(self, plan: DevicePlan, groups: list[ParamGroup], device: torch.device) -> None:
        """Let each rate know the count that its schedule is evaluated at, if that is a clock's."""
        schedules = {schedule for group in groups for _, schedule in group.schedules()}
        clocks = {
            id(self.table(each, device).rows): self.clock_of(each, device)
            for each in schedules
            if isinstance(each, Clocked)
        }
        for settings in plan.groups:
            for rate in settings.values():
                if isinstance(rate, Rate):
                    rate.clock = clocks.get(id(rate.table))

    @torch.inference_mode(False)  # as above
    def settle(self, attributes: Attributes) -> None:
        """Check every group, and install the schedules that were assigned to one."""
        _tidy(attributes)
        groups = attributes["param_groups"]
        changed = [group for group in groups if not group.is_settled()]
        for group in changed:
            for name, value in NEWER_SETTINGS.items():
                group.setdefault(name, value)
            for name, value in checked_settings(group).items():
                if value is not group[name]:
                    group[name] = value
        scheduled = [group for group in groups if group.outputs]
        if not changed and not scheduled:
            return
        users = Counter(schedule for group in groups for _, schedule in group.schedules())
        users.subtract(before for group in changed for before in group.replaced())
        devices = devices_of(attributes)
        for group in [*changed, *(group for group in scheduled if group.is_settled())]:
            self._settle_group(group, users, devices[0])
            group.mark_settled()
        if self.runner is not None and self.runner.has_captured():  # a graph may hold a report to one
            self._in_graphs += [table for key, table in self.tables.items() if table.is_plateau and not users[key[0]]]
        self.tables = {key: table for key, table in self.tables.items() if users[key[0]]}
        for device in devices:  # so that a graph, or who puts everything back, finds what it will find later
            self.state_on(device)
            for schedule in {schedule for group in groups for _, schedule in group.schedules()}:
                self.table(schedule, device)
                self.clock_of(schedule, device)

    def _settle_group(self, group: ParamGroup, users: Counter[Schedule], device: torch.device) -> None:
        """Settle one group. `users` counts how many settings each schedule drives; `device` is for an empty group."""
        group.check_outputs()
        on = (param.device for param in group["params"] if parameters.is_trained(param) and not param.is_meta)
        device = next(on, device)
        for name in SCHEDULABLE:
            assigned = isinstance(group[name], Schedule)
            schedule = group.settle(name, device)
            if schedule is None:
                continue
            if assigned and not users[schedule]:
                for table in self.tables_of(schedule):
                    table.restore({})  # an equal one, whose decay may have begun, was assigned before
            users[schedule] += assigned
            self._show_rate(group, name)

    def _check_once(self, groups: list[ParamGroup]) -> None:
        seen: dict[int, str] = {}
        for _, param, name in self.named_parameters(groups):
            if seen.setdefault(id(param), name) is not name:
                raise ValueError(
                    f"{name} is also {seen[id(param)]}, and would be updated twice in each step. Take it out of one "
                    "of the places in param_groups"
                )

    def _show_rate(self, group: ParamGroup, name: str) -> None:
        """Let a group show the rate of the next update, where no update has shown one yet."""
        group.show(name, self.coming(group, name, group.outputs[name].device))

    def next_lr(self, attributes: Attributes) -> list[float]:
        """See `FusedAdamW.next_lr`."""
        self.settle(attributes)
        groups, first = attributes["param_groups"], devices_of(attributes)[0]
        written = {id(output): (group, name) for group in groups for name, output in group.outputs.items()}
        rates = []
        for group in groups:
            source, name = written.get(id(group["lr"]), (group, "lr"))  # another group's schedule may write it
            device = source.outputs[name].device if name in source.outputs else first
            rates.append(float(self.coming(source, name, device, self.backend.evaluate)))
        return rates

    def renew_tables(self) -> None:
        """Let the next step see that a table has more layers than it had."""
        self.renewed += 1
        self.forget_plan()

    def measures_norm(self, groups: list[ParamGroup]) -> bool:
        """Whether a step takes the norm of the gradients."""
        return self.skip_nonfinite or any(is_limited(group) for group in groups)

    def named_parameters(self, groups: list[ParamGroup]) -> Iterator[tuple[int, Tensor, str]]:
        """See `nexus.optim.parameters.named_parameters`."""
        return parameters.named_parameters(groups)


def engine_of(optimizer: FusedAdamW) -> Engine:
    """The engine of an optimizer, also through a wrapper that passes on what it is asked, such as Lightning's."""
    return optimizer._engine


def attributes_of(optimizer: FusedAdamW) -> Attributes:
    """An optimizer's `Attributes`, also through such a wrapper, which has none of them itself."""
    own = optimizer.__dict__
    if "_engine" in own:
        return own
    return {name: getattr(optimizer, name) for name in ("param_groups", "state", "defaults")}


def devices_of(attributes: Attributes) -> list[torch.device]:
    """On which the parameters are, at least one."""
    # What is on the meta device is to come to another: until then it is nowhere.
    params = [param for group in attributes["param_groups"] for param in group["params"] if not param.is_meta]
    params = [param for param in params if parameters.is_trained(param)] or params
    return list(dict.fromkeys(param.device for param in params)) or [torch.device("cpu")]


def _tidy(attributes: Attributes) -> None:
    """Make lists of what was put there by hand, and groups of ours."""
    if not isinstance(attributes["param_groups"], list):
        attributes["param_groups"] = list(attributes["param_groups"])
    groups = attributes["param_groups"]
    for index, group in enumerate(groups):
        if not isinstance(group, ParamGroup):
            group = groups[index] = ParamGroup({**attributes["defaults"], **group})
        if not isinstance(group["params"], list):
            group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])


def _planned(groups: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What of each group a plan is made for."""
    return [(*(in_state(group[name]) for name in STATE_OPTIONS), keeps_products(group)) for group in groups]


def _check_kept(options: list[tuple[Any, ...]], captured: list[tuple[Any, ...]]) -> None:
    """Refuse to store state otherwise where graphs write to it as it is."""
    for index, (now, then) in enumerate(zip(options, captured, strict=False)):
        for name, value, before in zip(STATE_OPTIONS, now, then, strict=False):
            if name in STORAGE_DEFAULTS and value != before:
                raise RuntimeError(
                    f"group {index}'s {name!r} was changed from {before} to {value}, and a graph has captured a step "
                    "that writes to the state as it is: drop the graph first (reset() on a captured step), or set "
                    f"{name!r} back"
                )
        if now[-1] != then[-1]:
            raise RuntimeError(
                f"group {index}'s betas or bias_correction were changed so that the bias is corrected by other "
                "products of betas than in a graph that has captured a step: drop the graph first (reset() on a "
                "captured step), or set them back"
            )


def _share_schedule(settings: GroupSettings, name: str, source: GroupSettings, source_name: str) -> None:
    """Let a rate that is the tensor which a schedule of another group writes be that schedule's."""
    settings[name] = Rate(table=source[source_name].table)
    if name == source_name == "lr":
        settings["lr_scale"] = source["lr_scale"]
    elif source_name == "lr" and source["lr_scale"] != Rate(value=1.0):
        raise ValueError(
            f"a group's {name} is the tensor that another group's lr schedule writes, multiplied by its lr_scale: "
            "give that group lr_scale=1.0, or this one a Schedule of its own"
        )


def _check_scales(groups: list[ParamGroup]) -> None:
    if all(group.driver is None for group in groups):
        for group in groups:
            group.check_scale()
