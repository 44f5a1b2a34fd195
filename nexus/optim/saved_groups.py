"""What of a state dict fits an optimizer, asked before anything of it is loaded: whatever does not is named."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nexus.arguments import shown
from nexus.backends.interface import RATES
from nexus.optim.groups import ParamGroup
from nexus.optim.settings import BETAS, OF_ALL, SETTINGS, checked_settings
from nexus.optim.state import MOMENTS, scale_name
from nexus.optim.storage import STORAGE_DEFAULTS
from nexus.schedules import Schedule

FORMAT = 2
"""What `"nexus_format"` says in a state dict. One that earlier releases would misread gets the next number.

In 1, the scales of second moments in 8 bits were the largest moments; since then, they are the largest roots.
"""

SCHEDULE_KEYS = tuple(f"{name}_schedule" for name in RATES)

_ANOTHER_MODEL = "Give the optimizer the parameters, in the groups, that it was saved with"


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
    for key, state in state_dict["state"].items():
        if version == 1 and isinstance(state, dict) and scale_name("exp_avg_sq") in state:
            raise ValueError(
                f"state[{key!r}] of the loaded state dict has second moments in 8 bits as an earlier nexus stored "
                "them: load it there, and save it without compact=True, which every version reads"
            )
    saved_groups: list[dict[str, Any]] = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            f"loaded state dict has {len(saved_groups)} parameter groups, this optimizer {len(groups)}. "
            f"{_ANOTHER_MODEL}"
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _check_group(group, saved, f"param_groups[{index}] of the loaded state dict")
    keys = [key for saved in saved_groups for key in saved["params"]]
    known = set(keys)
    if len(known) < len(keys):
        raise ValueError(
            f"the loaded state dict has the same parameter index twice in 'param_groups'. {_ANOTHER_MODEL}"
        )
    for key, state in state_dict["state"].items():
        if key in known or (isinstance(key, str) and not key.isdecimal() and not _is_a_parameters(state)):
            continue  # under a string, there may be anything of a wrapper's
        hint = f"{_ANOTHER_MODEL}; or take out of 'state' what is of no parameter any more"
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
            f"{_ANOTHER_MODEL}"
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
        for name in RATES:
            if isinstance(saved_rate(saved, name), Schedule):
                raise ValueError(f"{name} must be a number; give the Schedule to the constructor")
        of_all = {name: saved[name] for name in OF_ALL if name in saved}
        checked_settings({**group, **loaded_settings(saved), **of_all})
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


def loaded_settings(saved: dict[str, Any]) -> dict[str, Any]:
    """Those of a saved group that are to be loaded: not its schedules, its storage, or another class's options."""
    stay = (*SCHEDULE_KEYS, *STORAGE_DEFAULTS, "bias_correction")
    chosen = {name: saved[name] for name in SETTINGS if name in saved and name not in stay}
    chosen = {"amsgrad": False, "maximize": False} | chosen  # what lacks them is older, or of no such option
    for name, value in chosen.items():
        if name == "betas" and isinstance(value, (tuple, list)):
            chosen[name] = tuple(map(_plain, value))
        elif name in RATES:
            chosen[name] = _plain(value)
    return chosen


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def saved_rate(saved: dict[str, Any], name: str) -> Any:
    """One of `RATES` as a saved group has it; None where it has none."""
    if name not in BETAS:
        return saved.get(name)
    betas = saved.get("betas")
    return betas[BETAS.index(name)] if isinstance(betas, (tuple, list)) and len(betas) == len(BETAS) else None
