"""The optimizer's state dict: interchangeable with `torch.optim.AdamW`'s, and loaded in place.

Everything is checked before anything is written. A group's schedule is saved under `lr_schedule` in plain types,
with `step`, its counter, and `edits`, what `begin_decay` and `extend_stable` have changed.
"""

from __future__ import annotations

import copy
import warnings
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nexus.arguments import MAX_STEP, check_count, check_number, shown
from nexus.backends.shards import local
from nexus.optim import tensor_list
from nexus.optim.param_group import SCHEDULABLE, SETTING_NAMES, ParamGroup, check_group
from nexus.optim.shards import respread
from nexus.schedules import WSD, Schedule
from nexus.segments import NEVER

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW

_REQUIRED = ("step", "exp_avg", "exp_avg_sq")
_SCHEDULE_KEYS = tuple(f"{name}_schedule" for name in SCHEDULABLE)


def state_dict(optimizer: FusedAdamW) -> dict[str, Any]:
    """See `FusedAdamW.state_dict`."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    optimizer._settle_groups()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    indices = {id(param): index for index, param in enumerate(params)}
    saved: dict[str, Any] = {
        "state": {
            indices[id(key)] if isinstance(key, Tensor) else key: _saved_state(value)
            for key, value in optimizer.state.items()
        },
        "param_groups": [_saved_group(optimizer, group, indices) for group in optimizer.param_groups],
    }
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, saved)
        saved = saved if replaced is None else replaced
    return saved


def _saved_state(state: Any) -> Any:
    if not isinstance(state, dict) or "step" not in state:
        return state
    # torch's AdamW adds a float to it: float64 is what its every path takes, and holds any count.
    return {**state, "step": torch.as_tensor(state["step"]).to(torch.float64)}


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
                "edits": dict.fromkeys(_edit_names(schedule)) | optimizer._table(schedule, device).edits(),
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
    pairs = list(zip(optimizer.param_groups, _checked_groups(optimizer, state_dict), strict=True))
    params = dict(
        zip(
            chain.from_iterable(saved["params"] for _, saved in pairs),
            chain.from_iterable(group["params"] for group, _ in pairs),
            strict=True,
        )
    )
    if len(params) < sum(len(group["params"]) for group, _ in pairs):
        raise ValueError("the loaded state dict has the same parameter index twice in 'param_groups'")
    states = state_dict["state"]
    for group, saved in pairs:
        amsgrad = bool(saved.get("amsgrad", group["amsgrad"]))
        for key in saved["params"]:
            _check_state(states.get(key), params[key], key, amsgrad=amsgrad)
    edits = []
    for group, saved in pairs:  # no comprehension: its frame would shift the warnings' stack level
        edits.append(_checked_edits(group, saved))

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
    for (group, saved), found in zip(pairs, edits, strict=True):
        _load_group(group, saved)
        for name, schedule in group.schedules():
            if name in found:
                edits_of.setdefault(schedule, found[name])
    for (schedule, _), table in optimizer._tables.items():
        table.restore(edits_of.get(schedule, {}))
    completed = _completed(pairs, states)
    for device in optimizer._devices():
        optimizer._state_on(device).completed.fill_(completed)
    optimizer._plan = None
    if optimizer._runner is not None:
        optimizer._runner.forget()  # not dropped: graphs that have captured a step read its tables
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _checked_groups(optimizer: FusedAdamW, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(state_dict.get("param_groups"), list) or not isinstance(state_dict.get("state"), dict):
        raise ValueError("not an optimizer's state dict: it needs 'param_groups' (a list) and 'state' (a dict)")
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"loaded state dict has {len(groups)} parameter groups, this optimizer {len(optimizer.param_groups)}"
        )
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        where = f"param_groups[{index}]"
        if not isinstance(saved, dict) or not isinstance(saved.get("params"), (list, tuple)):
            raise ValueError(
                f"{where} of the loaded state dict must be a dict with 'params', a list; got {shown(saved)}"
            )
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where} of the loaded state dict has {len(saved['params'])} parameters, that of this optimizer "
                f"{len(group['params'])}"
            )
        if "param_names" in saved and len(saved["param_names"]) != len(saved["params"]):
            raise ValueError(f"{where} of the loaded state dict has another number of param_names than of params")
        if "betas" not in saved or "eps" not in saved or saved.get("decoupled_weight_decay") is False:
            raise ValueError(f"{where} of the loaded state dict is not AdamW's: it has {sorted(saved)}")
        try:
            check_group({**group, **_settings(saved)})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where} of the loaded state dict: {error}") from None
    return groups


def _settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Those of a saved group that are to be loaded: not its schedules, and none of another class's options."""
    settings = {name: saved[name] for name in SETTING_NAMES if name in saved and name not in _SCHEDULE_KEYS}
    for name in SCHEDULABLE:
        if isinstance(settings.get(name), Tensor) and settings[name].numel() == 1:
            settings[name] = float(settings[name])
    return settings


def _check_state(state: Any, param: Tensor, key: Any, *, amsgrad: bool) -> None:
    if state is None or (isinstance(state, dict) and not state):
        return
    where = f"state[{key!r}] of the loaded state dict"
    has_max = amsgrad or (isinstance(state, dict) and "max_exp_avg_sq" in state)
    names = (*_REQUIRED, "max_exp_avg_sq") if has_max else _REQUIRED
    if not isinstance(state, dict) or any(name not in state for name in names):
        given = str(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        raise ValueError(f"{where} must have {', '.join(names)}, got {given}; was it another optimizer's?")
    for name in names[1:]:
        moment = state[name]
        if not isinstance(moment, Tensor) or moment.shape != param.shape:
            given = str(tuple(moment.shape)) if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(f"{where}: {name} must be of shape {tuple(param.shape)}, got {given}")
        if moment.layout != torch.strided or not moment.is_floating_point() or moment.is_meta:
            raise ValueError(
                f"{where}: {name} must be dense and of floating point, got {moment.dtype}, {moment.layout} on "
                f"{moment.device}"
            )
    step = state["step"]
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"{where}: step must have one element, got the shape {tuple(step.shape)}")
    try:
        in_range = 0 <= float(step) <= MAX_STEP
    except (TypeError, ValueError):
        in_range = False
    if not in_range:
        raise ValueError(f"{where}: step must be from 0 to 2**53, got {shown(step)}")


def _checked_edits(group: ParamGroup, saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The saved edits of each schedule of the group; warns where the saved schedule is another one."""
    edits: dict[str, dict[str, Any]] = {}
    for name in SCHEDULABLE:
        now, before = group[f"{name}_schedule"], saved.get(f"{name}_schedule")
        if before is None:
            continue
        if not isinstance(before, dict):
            raise ValueError(f"{name}_schedule of the loaded state dict must be a dict, got {shown(before)}")
        check_count(f"{name}_schedule['step'] of the loaded state dict", before.get("step"))
        if now is None:
            warnings.warn(
                f"the checkpoint's {name} was driven by a schedule, {before.get('type')}; this optimizer has a fixed "
                f"{name}, which goes on from {saved.get(name)!r}. Give the constructor "
                f"{name}={before.get('type')}(...) to go on with a schedule.",
                stacklevel=4,
            )
            continue
        mine = now.to_dict()
        kinds_differ = mine["type"] != before.get("type")
        for field in ("type",) if kinds_differ else dict.fromkeys((*mine, *before)):
            if field not in ("step", "edits") and mine.get(field) != before.get(field):
                warnings.warn(
                    f"{name}_schedule.{field} was {before.get(field)!r} in the checkpoint and is {mine.get(field)!r} "
                    "now; the run goes on with the latter",
                    stacklevel=4,
                )
        if not kinds_differ:
            edits[name] = _checked_table_edits(now, before.get("edits") or {}, f"{name}_schedule['edits']")
    return edits


def _edit_names(schedule: Schedule) -> tuple[str, ...]:
    """What can be edited of a schedule. All are saved: torch.distributed.checkpoint loads no entry that is new."""
    return ("extended", *_DECAY_EDITS) if isinstance(schedule, WSD) else ()


_DECAY_EDITS = ("decay_start", "decay_from")


def _checked_table_edits(schedule: Schedule, edits: Any, name: str) -> dict[str, Any]:
    name = f"{name} of the loaded state dict"
    allowed = _edit_names(schedule)
    if isinstance(edits, dict):
        edits = {key: value for key, value in edits.items() if value is not None}
    if not isinstance(edits, dict) or not set(edits) <= set(allowed) or len(set(_DECAY_EDITS) & set(edits)) == 1:
        raise ValueError(f"{name} must be a dict of {sorted(allowed) or 'nothing'}, got {shown(edits)}")
    for edit in ("extended", "decay_start"):
        if edit in edits:
            check_count(f"{edit} in {name}", edits[edit], high=NEVER)
    if "decay_from" in edits:
        check_number(f"decay_from in {name}", edits["decay_from"])
    return dict(edits)


def _load_state(optimizer: FusedAdamW, param: Tensor, saved: dict[str, Any] | None) -> None:
    if not saved:
        for value in optimizer.state.get(param, {}).values():
            if isinstance(value, Tensor):
                local(value).zero_()  # as if it had never had a gradient
        return
    state = optimizer.state[param]
    state["step"].copy_(torch.as_tensor(saved["step"]).to(torch.int64).reshape(()))
    for name in tensor_list.MOMENTS:
        if name in saved:
            local(state[name]).copy_(respread(saved[name], param))
        else:
            state.pop(name, None)  # of an amsgrad that is over
    for name, value in saved.items():
        if name not in ("step", *tensor_list.MOMENTS):
            state[name] = value


def _load_group(group: ParamGroup, saved: dict[str, Any]) -> None:
    for name, value in _settings(saved).items():
        if name in SCHEDULABLE:
            if isinstance(group[name], Tensor):
                group[name].detach().fill_(float(value))
                continue
            value = float(value)
        group[name] = value
    for name, value in saved.items():  # what a scheduler or the user has put there
        if name == "initial_lr" and (group["lr_schedule"] is not None or group.driver is not None):
            continue  # the rate that a scheduler began with: the schedule, or a scheduler that is here, stands
        if name not in ("params", *SETTING_NAMES, *_TORCH_OPTIONS):
            group[name] = copy.deepcopy(value)


_TORCH_OPTIONS = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def _completed(pairs: list[tuple[ParamGroup, dict[str, Any]]], states: dict[Any, Any]) -> int:
    """The saved count of updates: the largest there is, since torch's AdamW counts on in the parameters alone."""
    counts = [int(s["step"]) for s in states.values() if isinstance(s, dict) and "step" in s]
    for _, saved in pairs:
        counts += [int(saved[key]["step"]) for key in _SCHEDULE_KEYS if isinstance(saved.get(key), dict)]
    return max(counts, default=0)
