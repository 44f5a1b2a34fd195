"""The optimizer's state dict: interchangeable with `torch.optim.AdamW`'s, and loaded in place.

Everything is checked before anything is written. A group's schedule is saved under `lr_schedule` in plain types,
with `step`, its counter, and `edits`, what `begin_decay` and `extend_stable` have changed.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus.arguments import shown
from nexus.backends.shards import local
from nexus.optim import fitting, tensor_list
from nexus.optim.param_group import SCHEDULABLE, SETTING_NAMES, ParamGroup
from nexus.optim.shards import respread
from nexus.schedule_edits import saved_form
from nexus.schedules import Schedule

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


def state_dict(optimizer: FusedAdamW) -> dict[str, Any]:
    """See `FusedAdamW.state_dict`."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    optimizer._settle_groups()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    indices = {id(param): index for index, param in enumerate(params)}
    for key, value in optimizer.state.items():
        if isinstance(key, Tensor) and id(key) not in indices and value:
            raise RuntimeError(
                f"optimizer.state has an entry of a parameter p of shape {tuple(key.shape)} that is in no group any "
                "more. To save the optimizer without it, `del optimizer.state[p]`; or put p back into a group"
            )
    saved: dict[str, Any] = {
        "state": {
            indices[id(key)] if isinstance(key, Tensor) else key: _saved_state(value)
            for key, value in optimizer.state.items()
            if not isinstance(key, Tensor) or id(key) in indices
        },
        "param_groups": [_saved_group(optimizer, group, indices) for group in optimizer.param_groups],
        "nexus_format": fitting.FORMAT,
    }
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, saved)
        saved = saved if replaced is None else replaced
    return saved


def _saved_state(state: Any) -> Any:
    if not isinstance(state, dict) or "step" not in state:
        return state
    # torch's AdamW adds a float to it: float64 is what its every path takes, and holds any count.
    step = state["step"]
    if not isinstance(step, Tensor):  # whatever the defaults are
        step = torch.tensor(step, dtype=torch.float64, device="cpu")
    return {**state, "step": step.to(torch.float64)}


def _saved_group(optimizer: FusedAdamW, group: ParamGroup, indices: dict[int, int]) -> dict[str, Any]:
    saved = dict(group)
    saved["params"] = [indices[id(param)] for param in group["params"]]
    for name in SCHEDULABLE:
        if isinstance(group[name], Tensor):
            saved[name] = float(group[name])
        schedule = group[f"{name}_schedule"]
        if schedule is not None:
            device = group.outputs[name].device
            saved[f"{name}_schedule"] = {
                **schedule.to_dict(),
                "step": int(optimizer._state_on(device).completed),
                "edits": saved_form(schedule, optimizer._table(schedule, device).edits()),
            }
    return saved


def load_state_dict(optimizer: FusedAdamW, state_dict: dict[str, Any]) -> None:
    """See `FusedAdamW.load_state_dict`."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict as state_dict() returns it, got {shown(state_dict)}")
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = pre_hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced

    optimizer._settle_groups()
    pairs = list(zip(optimizer.param_groups, fitting.checked_groups(optimizer.param_groups, state_dict), strict=True))
    params = dict(
        zip(
            chain.from_iterable(saved["params"] for _, saved in pairs),
            chain.from_iterable(group["params"] for group, _ in pairs),
            strict=True,
        )
    )
    states = state_dict["state"]
    for group, saved in pairs:
        amsgrad = bool(saved.get("amsgrad", group["amsgrad"]))
        for key in saved["params"]:
            fitting.check_state(states.get(key), params[key], key, amsgrad=amsgrad)
    edits = []
    for index, (group, saved) in enumerate(pairs):  # no comprehension: its frame would shift the stack level
        edits.append(fitting.checked_edits(group, saved, index))
    extras = [_extra_entries(group, saved) for group, saved in pairs]
    completed = _completed(pairs, [states.get(key) for key in params])

    for key, param in params.items():
        own = optimizer.state.get(param, {})
        if states.get(key) and any(name in own and own[name].shape != param.shape for name in tensor_list.MOMENTS):
            optimizer.state[param] = {}  # of the shape that the parameter had before
    tensor_list.complete_states(
        [
            (param, optimizer.state[param], "max_exp_avg_sq" in states[key])
            for key, param in params.items()
            if states.get(key)
        ],
    )
    for key, param in params.items():
        _load_state(optimizer, param, states.get(key))
    for key, value in states.items():
        if key not in params:
            optimizer.state[key] = value
    edits_of: dict[Schedule, dict[str, Any]] = {}  # groups with the same schedule share its table
    for (group, saved), extra, found in zip(pairs, extras, edits, strict=True):
        _load_group(group, saved, extra)
        for name, schedule in group.schedules():
            if name in found:
                edits_of.setdefault(schedule, found[name])
    for (schedule, _), table in optimizer._tables.items():
        table.restore(edits_of.get(schedule, {}))
    for device in optimizer._devices():
        optimizer._state_on(device).completed.fill_(completed)
    optimizer._plan = None
    if optimizer._runner is not None:
        optimizer._runner.forget()  # not dropped: graphs that have captured a step read its tables
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _load_state(optimizer: FusedAdamW, param: Tensor, saved: dict[str, Any] | None) -> None:
    if not saved:
        for value in optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor):
                local(value).zero_()  # as if it had never had a gradient
        return
    state = optimizer.state[param]
    state["step"].fill_(int(saved["step"]))
    for name in tensor_list.MOMENTS:
        if name in saved:
            local(state[name]).copy_(respread(saved[name].detach(), param))
        else:
            state.pop(name, None)  # of an amsgrad that is over
    for name, value in saved.items():
        if name not in ("step", *tensor_list.MOMENTS):
            state[name] = copy.deepcopy(value)


def _extra_entries(group: ParamGroup, saved: dict[str, Any]) -> dict[str, Any]:
    """Copies of what a scheduler or the user has put into a saved group."""
    # The rate that a scheduler began with is not taken over where the schedule, or a scheduler that is here, stands.
    but = ("initial_lr",) if group["lr_schedule"] is not None or group.driver is not None else ()
    left = {
        name: value for name, value in saved.items() if name not in ("params", *SETTING_NAMES, *_TORCH_OPTIONS, *but)
    }
    return copy.deepcopy(left)


def _load_group(group: ParamGroup, saved: dict[str, Any], extra: dict[str, Any]) -> None:
    for name, value in fitting.settings(saved).items():
        if name in SCHEDULABLE:
            if isinstance(group[name], Tensor):
                group[name].detach().fill_(float(value))
                continue
            value = float(value)
        group[name] = value
    for name, value in extra.items():
        group[name] = value


_TORCH_OPTIONS = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def _completed(pairs: list[tuple[ParamGroup, dict[str, Any]]], states: list[Any]) -> int:
    """The saved count of updates: the largest there is, since torch's AdamW counts on in the parameters alone."""
    counts = [int(state["step"]) for state in states if state]
    for _, saved in pairs:
        counts += [int(saved[key]["step"]) for key in fitting.SCHEDULE_KEYS if isinstance(saved.get(key), dict)]
    return max(counts, default=0)
