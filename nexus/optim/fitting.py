"""What of a state dict fits an optimizer, asked before anything of it is loaded: whatever does not is named."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from nexus.arguments import MAX_STEP, check_count, shown
from nexus.backends.sharding import local
from nexus.optim import parameters
from nexus.optim.groups import OF_ALL, SCHEDULABLE, SETTINGS, ParamGroup, checked_settings
from nexus.optim.state import MOMENTS, REQUIRED
from nexus.schedules import Schedule
from nexus.schedules import edits as schedule_edits

FORMAT = 1
"""What `"nexus_format"` says in a state dict. One that earlier releases would misread gets the next number."""

SCHEDULE_KEYS = tuple(f"{name}_schedule" for name in SCHEDULABLE)

ANOTHER_MODEL = "Give the optimizer the parameters, in the groups, that it was saved with"


def checked_groups(groups: list[ParamGroup], state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The saved groups, one for each of `groups`; raises where the state dict or one of them does not fit."""
    version = state_dict.get("nexus_format", FORMAT)
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT:
        raise ValueError(
            f"'nexus_format' of the loaded state dict is {shown(version)}, and this nexus reads up to {FORMAT}: a "
            "newer one has saved it; update nexus"
        )
    if not isinstance(state_dict.get("param_groups"), list) or not isinstance(state_dict.get("state"), dict):
        raise ValueError(
            "not an optimizer's state dict: it needs 'param_groups' (a list) and 'state' (a dict), got the keys "
            f"{sorted(map(str, state_dict))}; pass {_nested(state_dict) or 'what state_dict() returned'}"
        )
    saved_groups: list[dict[str, Any]] = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict has {len(saved_groups)} parameter groups, this optimizer {len(groups)}. "
            f"{ANOTHER_MODEL}"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_group(group, saved, f"param_groups[{index}] of the loaded state dict")
    keys = [key for saved in saved_groups for key in saved["params"]]
    if len(set(keys)) < len(keys):
        raise ValueError(
            f"the loaded state dict has the same parameter index twice in 'param_groups'. {ANOTHER_MODEL}"
        )
    for key, state in state_dict["state"].items():
        if key in keys or (isinstance(key, str) and not key.isdecimal() and not _is_a_parameters(state)):
            continue  # under a string, there may be anything of a wrapper's
        hint = f"{ANOTHER_MODEL}; or take out of 'state' what is of no parameter any more"
        if isinstance(key, str):
            hint = (
                "JSON makes strings of indices: make them int, as state_dict() has them"
                if key.isdecimal()
                else "Have names in both places, or indices"
            )
        raise ValueError(
            f"state[{key!r}] of the loaded state dict is of no parameter: param_groups has {shown(keys)}. {hint}"
        )
    _check_order(groups, saved_groups)
    return saved_groups


def _is_a_parameters(state: object) -> bool:
    return isinstance(state, dict) and any(name in state for name in MOMENTS)


def _check_group(group: ParamGroup, saved: Any, where: str) -> None:
    if not isinstance(saved, dict) or not isinstance(saved.get("params"), (list, tuple)):
        raise ValueError(f"{where} must be a dict with 'params', a list, as state_dict() has it; got {shown(saved)}")
    if any(not isinstance(key, (int, str)) for key in saved["params"]):
        raise ValueError(
            f"{where} must have indices (or names) as 'params', as state_dict() has them; got "
            f"{shown(saved['params'])}"
        )
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(
            f"{where} has {len(saved['params'])} parameters, that of this optimizer {len(group['params'])}. "
            f"{ANOTHER_MODEL}"
        )
    names = saved.get("param_names", [""] * len(saved["params"]))
    if not isinstance(names, (list, tuple)) or len(names) != len(saved["params"]):
        raise ValueError(
            f"{where} must have a list of as many param_names as params, got {shown(names)}; delete the entry to "
            "keep this optimizer's names"
        )
    if not _is_adamw(saved):
        raise ValueError(
            f"{where} is not AdamW's: it has {sorted(map(str, saved))}. Load it into the class of optimizer that "
            "saved it; its moments mean nothing to AdamW (those of an Adam do if it had no weight decay)"
        )
    try:
        if any(isinstance(value, Tensor) and value.is_meta for value in saved.values()):
            raise ValueError("a tensor is on the meta device, and has no value")
        for name in SCHEDULABLE:
            if isinstance(saved.get(name), Schedule):
                raise ValueError(f"{name} must be a number; give the Schedule to the constructor")
        checked_settings({**group, **settings(saved), **{name: saved[name] for name in OF_ALL if name in saved}})
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: {error}. Correct this entry, or save the state dict again") from None


def _is_adamw(saved: dict[str, Any]) -> bool:
    """Whether a saved group may be AdamW's, by its keys. Adam, NAdam and RAdam have most of them, too."""
    if not {"lr", "betas", "eps", "weight_decay"} <= set(saved):
        return False
    if saved.get("decoupled_weight_decay") is False and saved["weight_decay"] != 0:
        return False  # Adam's, whose moments are of gradients with the weight decay in them
    is_radam = "decoupled_weight_decay" in saved and "amsgrad" not in saved and "fused" not in saved
    return "momentum_decay" not in saved and not is_radam


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


def settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Those of a saved group that are to be loaded: not its schedules, and none of another class's options."""
    settings = {name: saved[name] for name in SETTINGS if name in saved and name not in SCHEDULE_KEYS}
    for name in SCHEDULABLE:
        if isinstance(settings.get(name), Tensor) and settings[name].numel() == 1:
            settings[name] = float(settings[name])
    return settings


def check_state(state: Any, param: Tensor, key: Any, *, amsgrad: bool) -> None:
    """Raise where the saved state of a parameter, `state[key]`, does not fit it."""
    if state is None or (isinstance(state, dict) and not state):
        return
    where = f"state[{key!r}] of the loaded state dict"
    remedy = "Without the entry, the parameter begins anew, with a count and moments of 0"
    if param.is_meta:
        raise ValueError(f"{where} is of a parameter on the meta device: give the model memory before the load")
    has_max = amsgrad or (isinstance(state, dict) and "max_exp_avg_sq" in state)
    names = (*REQUIRED, "max_exp_avg_sq") if has_max else REQUIRED
    if not isinstance(state, dict) or any(name not in state for name in names):
        given = str(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        missing = ", ".join(name for name in names if not isinstance(state, dict) or name not in state)
        raise ValueError(
            f"{where} must have {', '.join(names)}, got {given}; was it another optimizer's? Put in what is missing "
            f"({missing}) if there are these numbers. {remedy}"
        )
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
        if parameters.is_freed(local(moment)):
            raise ValueError(f"{where}: {name} has no memory: its storage was freed. {remedy}")
        wide = local(moment) if moment.dtype.itemsize > 1 else local(moment).float()  # float8 has no comparison
        if name != "exp_avg" and bool((wide < 0).any()):
            raise ValueError(f"{where}: {name} is negative somewhere, which no average of squares is. {remedy}")
    step = state["step"]
    if isinstance(step, Tensor) and (step.numel() != 1 or step.is_meta):
        given = f"the shape {tuple(step.shape)} on {step.device}"
        raise ValueError(f"{where}: step must have one element, and not be on meta, got {given}. {remedy}")
    try:
        in_range = 0 <= float(step) <= MAX_STEP  # may be an average of several
    except (TypeError, ValueError, RuntimeError, OverflowError):
        in_range = False
    if not in_range:
        raise ValueError(f"{where}: step must be from 0 to 2**53, got {shown(step)}. {remedy}")


def checked_edits(group: ParamGroup, saved: dict[str, Any], index: int) -> dict[str, dict[str, Any]]:
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
        if found is not None:
            edits[name] = found
        for difference in schedule_edits.differences(f"{name}_schedule", now.to_dict(), before):
            warnings.warn(difference, stacklevel=4)
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
    return schedule_edits.checked_edits(now, before.get("edits"), f"{name}['edits']")
