"""The optimizer's state dict: interchangeable with `torch.optim.AdamW`'s.

Everything is checked before anything is written. A load gives the parameters new moments, so that state dicts which
were taken before keep theirs; where a graph has captured a step, or other processes share them, it writes in place.
A group's schedule is saved under `lr_schedule` in plain types, with `step`, its counter, and `edits`, what
`begin_decay` and `extend_stable` have changed.
"""

from __future__ import annotations

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nexus.arguments import shown
from nexus.backends.interface import STATE_NAMES
from nexus.backends.sharding import local, respread
from nexus.optim import fitting, parameters
from nexus.optim.engine import Engine, attributes_of, devices_of, engine_of
from nexus.optim.foreign import as_torch_saves
from nexus.optim.groups import SCHEDULABLE, SETTINGS, ParamGroup
from nexus.optim.state import MOMENTS, check_unshared, complete_states, is_complete, is_shared
from nexus.schedules import Schedule
from nexus.schedules.edits import saved_form

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


def state_dict(optimizer: FusedAdamW) -> dict[str, Any]:
    """See `FusedAdamW.state_dict`."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    engine = engine_of(optimizer)
    engine.settle(attributes_of(optimizer))
    indices: dict[int, int] = {}
    for index, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        indices.setdefault(id(param), index)  # the first place of one that is in several
    states: dict[Any, Any] = {}
    for key, value in optimizer.state.items():
        if id(key) in indices:
            states[indices[id(key)]] = value
        elif not isinstance(key, Tensor):
            states[key] = value
        elif value:
            raise RuntimeError(
                f"optimizer.state has an entry of a parameter p of shape {tuple(key.shape)} that is in no group any "
                "more. To save the optimizer without it, `del optimizer.state[p]`; or put p back into a group"
            )
    saved: dict[str, Any] = {
        "state": states,
        "param_groups": [_saved_group(engine, group, indices) for group in optimizer.param_groups],
        "nexus_format": fitting.FORMAT,
    }
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, saved)
        saved = saved if replaced is None else replaced
    return saved


def _saved_group(engine: Engine, group: ParamGroup, indices: dict[int, int]) -> dict[str, Any]:
    saved = dict(group)
    saved["params"] = [indices[id(param)] for param in group["params"]]
    for name in SCHEDULABLE:
        if type(group[name]) is float:
            continue
        if isinstance(group[name], Tensor):
            saved[name] = float(group[name])
        schedule = group[f"{name}_schedule"]
        if schedule is not None:
            device = group.outputs[name].device
            saved[f"{name}_schedule"] = {
                **schedule.to_dict(),
                "step": int(engine.state_on(device).completed),
                "edits": saved_form(schedule, engine.table(schedule, device).edits()),
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

    state_dict = as_torch_saves(state_dict)
    engine = engine_of(optimizer)
    engine.settle(attributes_of(optimizer))
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
            if parameters.is_trained(params[key]):
                fitting.check_state(states.get(key), params[key], key, amsgrad=amsgrad)
    edits = []
    for index, (group, saved) in enumerate(pairs):  # no comprehension: its frame would shift the stack level
        edits.append(fitting.checked_edits(group, saved, index))
    extras = [_extra_entries(group, saved) for group, saved in pairs]
    completed = _completed(pairs, [states.get(key) for key in params])

    in_place = engine.runner is not None and engine.runner.has_captured()
    own = optimizer.state
    names = {id(param): name for _, param, name in engine.named_parameters(optimizer.param_groups)}
    others = {}  # keys of others in the state, copied before anything is written
    for key, param in params.items():
        check_unshared(own.get(param), param, names[id(param)])
        state = states.get(key) or {}
        kept = () if not parameters.is_trained(param) else STATE_NAMES  # of what is frozen, all stays as it is
        others[key] = {name: _copied(value, param) for name, value in state.items() if name not in kept}
    for left in [each for each in own if not isinstance(each, Tensor) or own.get(each) is None]:
        del own[left]
    for key, param in params.items():
        present, saved = own.pop(param, None), states.get(key)
        if parameters.is_trained(param):
            state = _loaded_state(param, present, saved, names[id(param)], in_place=in_place)
        else:
            state = None if saved is None else {}
        del present
        if state is not None:
            own[param] = state | others[key]
    for key, value in states.items():
        if key not in params:
            own[key] = value
    edits_of: dict[Schedule, dict[str, Any]] = {}  # groups with the same schedule share its table
    for (group, saved), extra, found in zip(pairs, extras, edits, strict=True):
        _load_group(group, saved, extra)
        for name, schedule in group.schedules():
            if name in found:
                edits_of.setdefault(schedule, found[name])
    for (schedule, _), table in engine.tables.items():
        table.restore(edits_of.get(schedule, {}))
    for device in devices_of(attributes_of(optimizer)):
        engine.state_on(device).completed.fill_(completed)
    engine.forget_plan()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _loaded_state(
    param: Tensor, present: Any, saved: dict[str, Any] | None, where: str, *, in_place: bool
) -> dict[str, Any] | None:
    """The state of a parameter after a load: what was saved, in new tensors or in those that must stay."""
    kept = {}
    if is_complete(present):
        streams = {name: present[name] for name in STATE_NAMES if name in present}
        if in_place or any(isinstance(each, Tensor) and is_shared(each) for each in streams.values()):
            kept = streams
    if not saved:
        for value in kept.values():
            local(value).zero_()  # as if it had never had a gradient
        return kept or None
    if any(kept[name].shape != param.shape for name in MOMENTS if name in kept):
        kept = {}  # of the shape that the parameter had before
    del present  # what is not kept is freed before its successor is made
    complete_states([(kept, param, where, "max_exp_avg_sq" in saved)])
    kept["step"].fill_(float(saved["step"]))
    for name in MOMENTS:
        if name in saved:
            local(kept[name]).copy_(respread(saved[name].detach(), param))
        else:
            kept.pop(name, None)  # of an amsgrad that is over
    return kept


def _copied(value: Any, param: Tensor) -> Any:
    """A copy of what somebody has put into the state of a parameter.

    Its tensors come to the parameter's device, as in torch. There, they take its type, too; here, one for both.
    """

    def moved(tensor: Tensor) -> Tensor:
        wide = tensor.is_floating_point() and param.is_floating_point()
        return tensor.to(param.device, torch.promote_types(tensor.dtype, param.dtype) if wide else tensor.dtype)

    return tree_map_only(Tensor, moved, copy.deepcopy(value))


def _extra_entries(group: ParamGroup, saved: dict[str, Any]) -> dict[str, Any]:
    """Copies of what a scheduler or the user has put into a saved group."""
    own = ("params", *SETTINGS, *_TORCH_OPTIONS, *_kept_by_drivers(group))
    return copy.deepcopy({name: value for name, value in saved.items() if name not in own})


def _kept_by_drivers(group: ParamGroup) -> tuple[str, ...]:
    """The rate that a scheduler began with stands where a schedule, or a scheduler that is here, does."""
    return ("initial_lr",) if group["lr_schedule"] is not None or group.driver is not None else ()


def _load_group(group: ParamGroup, saved: dict[str, Any], extra: dict[str, Any]) -> None:
    stay = ("params", "param_names", *SETTINGS, *_TORCH_OPTIONS, *_kept_by_drivers(group))
    for name in [name for name in group if name not in stay and name not in extra]:
        del group[name]  # of a range test, say, whose rates are not to come back
    for name, value in fitting.settings(saved).items():
        if name in SCHEDULABLE:
            if group[name] is group.outputs.get(name):
                group.show(name, float(value))
                continue
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
    counts = [int(float(state["step"])) for state in states if state]
    for _, saved in pairs:
        counts += [int(saved[key]["step"]) for key in fitting.SCHEDULE_KEYS if isinstance(saved.get(key), dict)]
    return max(counts, default=0)
