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

FORMAT = 1
"""What `"nexus_format"` says in a state dict. One that earlier releases would misread gets the next number."""

_REQUIRED = ("step", "exp_avg", "exp_avg_sq")
_SCHEDULE_KEYS = tuple(f"{name}_schedule" for name in SCHEDULABLE)
_ANOTHER_MODEL = "Give the optimizer the parameters, in the groups, that it was saved with"


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
        "nexus_format": FORMAT,
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
        raise ValueError(
            f"the loaded state dict has the same parameter index twice in 'param_groups'. {_ANOTHER_MODEL}"
        )
    _check_order([group for group, _ in pairs], [saved for _, saved in pairs])
    states = state_dict["state"]
    for group, saved in pairs:
        amsgrad = bool(saved.get("amsgrad", group["amsgrad"]))
        for key in saved["params"]:
            _check_state(states.get(key), params[key], key, amsgrad=amsgrad)
    edits = []
    for index, (group, saved) in enumerate(pairs):  # no comprehension: its frame would shift the stack level
        edits.append(_checked_edits(group, saved, index))
    extras = [_extra_entries(group, saved) for group, saved in pairs]
    completed = _completed(pairs, [states.get(key) for key in params])

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


def _checked_groups(optimizer: FusedAdamW, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(state_dict.get("param_groups"), list) or not isinstance(state_dict.get("state"), dict):
        raise ValueError(
            "not an optimizer's state dict: it needs 'param_groups' (a list) and 'state' (a dict), got the keys "
            f"{sorted(map(str, state_dict))}; pass {_nested(state_dict) or 'what state_dict() returned'}"
        )
    version = state_dict.get("nexus_format", FORMAT)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise ValueError(
            f"'nexus_format' of the loaded state dict is {shown(version)}, and this nexus reads up to {FORMAT}: a "
            "newer one has saved it; update nexus"
        )
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"loaded state dict has {len(groups)} parameter groups, this optimizer {len(optimizer.param_groups)}. "
            f"{_ANOTHER_MODEL}"
        )
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        where = f"param_groups[{index}] of the loaded state dict"
        if not isinstance(saved, dict) or not isinstance(saved.get("params"), (list, tuple)):
            raise ValueError(
                f"{where} must be a dict with 'params', a list, as state_dict() has it; got {shown(saved)}"
            )
        if any(not isinstance(key, (int, str)) for key in saved["params"]):
            raise ValueError(
                f"{where} must have indices (or names) as 'params', as state_dict() has them; got "
                f"{shown(saved['params'])}"
            )
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"{where} has {len(saved['params'])} parameters, that of this optimizer {len(group['params'])}. "
                f"{_ANOTHER_MODEL}"
            )
        names = saved.get("param_names", [""] * len(saved["params"]))
        if not isinstance(names, (list, tuple)) or len(names) != len(saved["params"]):
            raise ValueError(
                f"{where} must have a list of as many param_names as params, got {shown(names)}; delete the entry to "
                "keep this optimizer's names"
            )
        if "betas" not in saved or "eps" not in saved or saved.get("decoupled_weight_decay") is False:
            raise ValueError(
                f"{where} is not AdamW's: it has {sorted(map(str, saved))}. Load it into the class of optimizer that "
                "saved it; its moments mean nothing to AdamW"
            )
        try:
            if any(isinstance(value, Tensor) and value.is_meta for value in saved.values()):
                raise ValueError("a tensor is on the meta device, and has no value")
            check_group({**group, **_settings(saved)})
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{where}: {error}. Correct this entry, or save the state dict again") from None
    return groups


def _nested(state_dict: dict[str, Any]) -> str | None:
    """How to write the first state dict of an optimizer that is inside of this one, as a trainer saves it."""
    for key, value in state_dict.items():
        listed = isinstance(value, (list, tuple))
        for index, each in enumerate(value if listed else (value,)):
            if isinstance(each, dict) and "param_groups" in each:
                return f"state_dict[{key!r}]" + (f"[{index}]" if listed else "")
    return None


def _check_order(groups: list[ParamGroup], saved_groups: list[dict[str, Any]]) -> None:
    """Refuse the same names in another order. Other names are taken over with their state, as by torch."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
    if not all("param_names" in group for group in (*groups, *saved_groups)):
        return
    mine, theirs = ([name for group in each for name in group["param_names"]] for each in (groups, saved_groups))
    if mine == theirs or sorted(map(str, mine)) != sorted(map(str, theirs)):
        return
    (g, i), name, saved = next(found for found in zip(places, mine, theirs, strict=True) if found[1] != found[2])
    raise ValueError(
        f"param_groups[{g}]['param_names'][{i}] of the loaded state dict is {saved!r}, that of this optimizer "
        f"{name!r}: the same parameters in another order, and each would get the moments of another. Make the "
        "optimizer with the parameters in the saved order"
    )


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
    remedy = "Delete this entry to let the parameter begin anew"
    if param.is_meta:
        raise ValueError(f"{where} is of a parameter on the meta device: give the model memory before the load")
    has_max = amsgrad or (isinstance(state, dict) and "max_exp_avg_sq" in state)
    names = (*_REQUIRED, "max_exp_avg_sq") if has_max else _REQUIRED
    if not isinstance(state, dict) or any(name not in state for name in names):
        given = str(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        raise ValueError(f"{where} must have {', '.join(names)}, got {given}; was it another optimizer's? {remedy}")
    for name in names[1:]:
        moment = state[name]
        if not isinstance(moment, Tensor) or moment.shape != param.shape:
            given = str(tuple(moment.shape)) if isinstance(moment, Tensor) else type(moment).__name__
            raise ValueError(
                f"{where}: {name} must be of shape {tuple(param.shape)}, got {given}; another model's? {remedy}"
            )
        if moment.layout != torch.strided or not moment.is_floating_point() or moment.is_meta:
            raise ValueError(
                f"{where}: {name} must be dense, of floating point and not on meta, got {moment.dtype}, "
                f"{moment.layout} on {moment.device}. {remedy}"
            )
    step = state["step"]
    if isinstance(step, Tensor) and (step.numel() != 1 or step.is_meta):
        given = f"the shape {tuple(step.shape)} on {step.device}"
        raise ValueError(f"{where}: step must have one element, and not be on meta, got {given}. {remedy}")
    try:
        in_range = 0 <= float(step) <= MAX_STEP and float(step) == int(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        in_range = False
    if not in_range:
        raise ValueError(f"{where}: step must be from 0 to 2**53, got {shown(step)}. {remedy}")


def _checked_edits(group: ParamGroup, saved: dict[str, Any], index: int) -> dict[str, dict[str, Any]]:
    """The saved edits of each schedule of the group; warns where the saved schedule is another one."""
    edits: dict[str, dict[str, Any]] = {}
    for name in SCHEDULABLE:
        now, before = group[f"{name}_schedule"], saved.get(f"{name}_schedule")
        if before is None:
            continue
        try:
            found = _checked_schedule(now, before, f"{name}_schedule")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"param_groups[{index}] of the loaded state dict: {error}. If a newer nexus has saved it, update "
                f"nexus; or set this {name}_schedule to None, to go on without what it says"
            ) from None
        if now is None:
            warnings.warn(
                f"the checkpoint's {name} was driven by a schedule, {before.get('type')}; this optimizer has a fixed "
                f"{name}, which goes on from {saved.get(name)!r}. Give the constructor "
                f"{name}={before.get('type')}(...) to go on with a schedule.",
                stacklevel=4,
            )
            continue
        mine = now.to_dict()
        if found is not None:
            edits[name] = found
        for field in mine if found is not None else ("type",):
            if mine[field] != before[field]:
                warnings.warn(
                    f"{name}_schedule.{field} was {before[field]!r} in the checkpoint and is {mine[field]!r} now; "
                    "the run goes on with the latter",
                    stacklevel=4,
                )
    return edits


def _checked_schedule(now: Schedule | None, before: Any, name: str) -> dict[str, Any] | None:
    """The saved edits, where the saved schedule is of the type of the present one."""
    if not isinstance(before, dict):
        raise ValueError(f"{name} must be a dict, got {shown(before)}")
    check_count(f"{name}['step']", before.get("step"))
    kind = before.get("type")
    if str(kind) not in Schedule._types:
        known = ", ".join(Schedule._types)
        raise ValueError(f"{name}['type'] must be one of {known}, got {shown(kind)}")
    if now is None or now.to_dict()["type"] != kind:
        return None  # a partial load has left fields of this optimizer's schedule in it
    Schedule.from_dict({key: value for key, value in before.items() if key not in ("step", "edits")})
    return _checked_table_edits(now, before.get("edits") or {}, f"{name}['edits']")


def _edit_names(schedule: Schedule) -> tuple[str, ...]:
    """What can be edited of a schedule. All are saved: torch.distributed.checkpoint loads no entry that is new."""
    return ("extended", *_DECAY_EDITS) if isinstance(schedule, WSD) else ()


_DECAY_EDITS = ("decay_start", "decay_from")


def _checked_table_edits(schedule: Schedule, edits: Any, name: str) -> dict[str, Any]:
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
    state["step"].fill_(int(saved["step"]))
    for name in tensor_list.MOMENTS:
        if name in saved:
            local(state[name]).copy_(respread(saved[name], param))
        else:
            state.pop(name, None)  # of an amsgrad that is over
    for name, value in saved.items():
        if name not in ("step", *tensor_list.MOMENTS):
            state[name] = value


def _extra_entries(group: ParamGroup, saved: dict[str, Any]) -> dict[str, Any]:
    """Copies of what a scheduler or the user has put into a saved group."""
    # The rate that a scheduler began with is not taken over where the schedule, or a scheduler that is here, stands.
    but = ("initial_lr",) if group["lr_schedule"] is not None or group.driver is not None else ()
    left = {
        name: value for name, value in saved.items() if name not in ("params", *SETTING_NAMES, *_TORCH_OPTIONS, *but)
    }
    return copy.deepcopy(left)


def _load_group(group: ParamGroup, saved: dict[str, Any], extra: dict[str, Any]) -> None:
    for name, value in _settings(saved).items():
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
        counts += [int(saved[key]["step"]) for key in _SCHEDULE_KEYS if isinstance(saved.get(key), dict)]
    return max(counts, default=0)
