"""The optimizer's state dict: interchangeable with `torch.optim.AdamW`'s.

Everything is checked before anything is written. A load gives the parameters new moments, so that state dicts which
were taken before keep theirs; where a graph has captured a step, or other processes share them, it writes in place.
A group's schedule is saved under `lr_schedule` in plain types, with `step`, its counter, `edits`, what
`begin_decay` and `extend_stable` have changed of a WSD, `pieces`, what any edit has put in force since, and of a
`ReduceOnPlateau` `reports`, what it has heard. So is that of `beta1`, `beta2`, `eps`, `max_grad_norm` and `lr_scale`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from nexus.arguments import check_count, shown
from nexus.backends.interface import RATES
from nexus.backends.sharding import is_spread
from nexus.optim.averages import saved_average, warn_of_difference
from nexus.optim.engine import Engine, attributes_of, devices_of, engine_of
from nexus.optim.foreign import as_torch_saves
from nexus.optim.groups import ParamGroup, shown_name
from nexus.optim.parameters import is_trained, named_parameters
from nexus.optim.saved import SAVED_NAMES, check_saved, has_codes, loaded, saved_state
from nexus.optim.saved_groups import FORMAT, SCHEDULE_KEYS, checked_groups, loaded_settings, saved_rate
from nexus.optim.settings import BETAS, SCHEDULABLE, SETTINGS
from nexus.optim.state import check_unshared
from nexus.optim.storage import STORAGE_DEFAULTS, Storage, keeps_products, storage_of
from nexus.schedules import Schedule
from nexus.schedules import edits as schedule_edits
from nexus.schedules.clock import Clock, Clocked, unclocked
from nexus.schedules.reports import NAMES

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


_BESIDE = ("step", "edits", "pieces", "reports")
"""What a group's saved schedule has besides its own fields."""

_Edits: TypeAlias = tuple[dict[str, Any], list[tuple[int, Schedule, bool]], list[float] | None]

_TORCH_OPTIONS = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


def state_dict(optimizer: FusedAdamW, *, compact: bool = False) -> dict[str, Any]:
    """See `FusedAdamW.state_dict`."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    engine = engine_of(optimizer)
    engine.check_shows_parameters("state_dict()")
    engine.settle(attributes_of(optimizer))
    indices: dict[int, int] = {}
    for index, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
        indices.setdefault(id(param), index)  # the first place of one that is in several
    states: dict[Any, Any] = {}
    if compact and any(is_spread(param) for group in optimizer.param_groups for param in group["params"]):
        raise ValueError(
            "compact=True is for parameters that are whole in each process: codes of a DTensor's part mean nothing "
            "beside another part. Leave it out; torch.distributed.checkpoint saves the float32 moments in parts"
        )
    for key, value in optimizer.state.items():
        if id(key) in indices:
            decodes = not compact and (is_trained(key) or has_codes(value))
            states[indices[id(key)]] = saved_state(key, value) if decodes else value
        elif not isinstance(key, Tensor):
            states[key] = value
        elif value:
            raise RuntimeError(
                f"optimizer.state has an entry of a parameter p of shape {tuple(key.shape)} that is in no group any "
                "more. To save the optimizer without it, `del optimizer.state[p]`; or put p back into a group"
            )
    device = devices_of(attributes_of(optimizer))[0]
    for silence in _silences(engine):
        warnings.warn(silence, stacklevel=5)
    saved: dict[str, Any] = {
        "state": states,
        "param_groups": [_saved_group(engine, group, indices, device) for group in optimizer.param_groups],
        "nexus_format": FORMAT,
    }
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = post_hook(optimizer, saved)
        saved = saved if replaced is None else replaced
    return saved


def _saved_group(engine: Engine, group: ParamGroup, indices: dict[int, int], device: torch.device) -> dict[str, Any]:
    saved = dict(group)
    saved["params"] = [indices[id(param)] for param in group["params"]]
    for name in STORAGE_DEFAULTS:
        if isinstance(group[name], torch.dtype):
            saved[name] = str(group[name])  # torch.distributed.checkpoint refuses all but plain types
    saved["average"] = _saved_average(engine, group)
    for name in RATES:
        _save_rate(engine, group, name, saved, device)
    return saved


def _save_rate(engine: Engine, group: ParamGroup, name: str, saved: dict[str, Any], device: torch.device) -> None:
    """Put one of `RATES` into a saved group: as a float, which torch loads, and its schedule, if it has one."""
    value, schedule = group.given(name), group.schedule(name)
    if (schedule is None and not isinstance(value, Tensor)) or name == "average_decay":  # see _saved_average
        return
    device = _device_of(group, name, device)
    number = float(value) if isinstance(value, Tensor) else float(engine.coming(group, name, device))
    if name in BETAS:
        saved["betas"] = tuple(
            number if name == each else beta for each, beta in zip(BETAS, saved["betas"], strict=True)
        )
    else:
        saved[name] = number
    if schedule is None:
        return
    table = engine.table(schedule, device)
    saved[f"{name}_schedule"] = {
        **schedule.to_dict(),
        "step": int(engine.clock_of(schedule, device)),
        "edits": schedule_edits.saved_form(schedule, table.edits()),
        "pieces": table.saved_pieces(),
    }
    heard = table.reports()
    if heard is not None:
        saved[f"{name}_schedule"]["reports"] = heard


def _device_of(group: ParamGroup, name: str, device: torch.device) -> torch.device:
    """Where the table of one of `RATES` is read: with its output, or on `device`."""
    return group.outputs[name].device if name in group.outputs else device


def _saved_average(engine: Engine, group: ParamGroup) -> dict[str, Any] | None:
    average = group["average"]
    saved = saved_average(average)
    if saved is not None and "decay" in saved and average.schedule is not None:
        device = next((param.device for param in group["params"] if not param.is_meta), torch.device("cpu"))
        saved["decay"]["step"] = int(engine.clock_of(average.schedule, device))
    return saved


def _silences(engine: Engine) -> Iterator[str]:
    """What to warn of, once: a plateau that was trained with and has heard nothing, a clock that was never moved."""
    for (schedule, device), table in engine.tables.items():
        completed = int(engine.state_on(device).completed)
        if completed == 0 or table.has_warned:
            continue
        heard = table.reports()
        if heard is not None and heard[NAMES.index("reports")] == 0.0:
            table.has_warned = True
            yield (
                f"{type(table.schedule).__name__} has heard no metric in {completed:,} updates, and lowers no rate "
                "without: call optimizer.report(metric), after each evaluation or in each step"
            )
        elif isinstance(schedule, Clocked) and int(engine.clock_of(schedule, device)) == 0:
            table.has_warned = True
            yield (
                f"{shown(schedule)} is at a clock that stands at 0 after {completed:,} updates: call "
                "optimizer.advance(clock, n) after each"
            )


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
    engine.check_shows_parameters("load_state_dict()")
    engine.settle(attributes_of(optimizer))
    pairs = list(zip(optimizer.param_groups, checked_groups(optimizer.param_groups, state_dict), strict=True))
    states, params = state_dict["state"], {}
    storages: dict[Any, Storage] = {}
    for group, saved in pairs:
        options = {**group, "amsgrad": bool(saved.get("amsgrad", False))}
        for key, param in zip(saved["params"], group["params"], strict=True):
            params[key] = param
            if is_trained(param):
                storages[key] = storage_of(param, options, f"state[{key!r}]")
                check_saved(states.get(key), param, key, storages[key])
    edits, device = [], devices_of(attributes_of(optimizer))[0]
    for index, (group, saved) in enumerate(pairs):  # no comprehension: its frame would shift the stack level
        edits.append(_checked_edits(group, saved, index))
        form = group["bias_correction"]
        if keeps_products({**group, "bias_correction": "product"}) and saved.get("bias_correction", form) != form:
            warnings.warn(
                f"group {index} was saved with bias_correction={saved['bias_correction']!r}, and goes on with "
                f"{form!r}",
                stacklevel=3,
            )
        warn_of_difference(group["average"], saved, [states.get(key) for key in saved["params"]], index)
        for name, schedule in group.schedules():
            if name in edits[-1]:
                table = engine.table(schedule, _device_of(group, name, device))
                for _, piece, _ in edits[-1][name][1]:
                    table.check_edit(piece)
    extras = [_extra_entries(group, saved) for group, saved in pairs]
    completed = _completed(pairs, [states.get(key) for key in params])
    counts = _clock_counts(pairs)

    in_place = engine.runner is not None and engine.runner.has_captured()
    _load_states(optimizer, params, states, storages, in_place=in_place)
    edits_of: dict[Schedule, _Edits] = {}  # groups with the same schedule share its table
    for (group, saved), extra, found in zip(pairs, extras, edits, strict=True):
        _load_group(group, saved, extra)
        for name, schedule in group.schedules():
            if name in found:
                edits_of.setdefault(schedule, found[name])
    for (schedule, _), table in engine.tables.items():
        table.restore(*edits_of.get(schedule, ({}, (), None)))
    for device in devices_of(attributes_of(optimizer)):
        state = engine.state_on(device)
        state.completed.fill_(completed)
        for clock, count in counts.items():
            engine.clocks.on(clock, state).start_at(count, state)
    engine.forget_plan()
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _load_states(
    optimizer: FusedAdamW,
    params: dict[Any, Tensor],
    states: dict[Any, Any],
    storages: dict[Any, Storage],
    *,
    in_place: bool,
) -> None:
    """Give each parameter its saved state, which fits it. `params` are by the keys of `states`."""
    own = optimizer.state
    names = {id(param): name for _, param, name in named_parameters(optimizer.param_groups)}
    others = {}  # keys of others in the state, copied before anything is written
    for key, param in params.items():
        check_unshared(own.get(param), param, names[id(param)])
        kept = SAVED_NAMES if is_trained(param) else ()  # of what is frozen, all stays as it is
        state = states.get(key) or {}
        others[key] = {name: _copied(value, param) for name, value in state.items() if name not in kept}
    for left in [each for each in own if not isinstance(each, Tensor) or own.get(each) is None]:
        del own[left]
    for key, param in params.items():
        present, saved = own.pop(param, None), states.get(key)
        if is_trained(param):
            state = loaded(param, present, saved, storages[key], names[id(param)], in_place=in_place)
        else:
            state = None if saved is None else {}
        del present
        if state is not None:
            own[param] = state | others[key]
    own.update((key, value) for key, value in states.items() if key not in params)


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
    own = ("params", *SETTINGS, *SCHEDULE_KEYS, *_TORCH_OPTIONS, *_kept_by_drivers(group))
    return copy.deepcopy({name: value for name, value in saved.items() if name not in own})


def _kept_by_drivers(group: ParamGroup) -> tuple[str, ...]:
    """The rate that a scheduler began with stands where a schedule, or a scheduler that is here, does."""
    return ("initial_lr",) if group["lr_schedule"] is not None or group.driver is not None else ()


def _load_group(group: ParamGroup, saved: dict[str, Any], extra: dict[str, Any]) -> None:
    stay = ("params", "param_names", *SETTINGS, *_TORCH_OPTIONS, *_kept_by_drivers(group))
    for name in [name for name in group if name not in stay and name not in extra]:
        del group[name]  # of a range test, say, whose rates are not to come back
    for name, value in loaded_settings(saved).items():
        if name == "max_grad_norm" and value == 0:
            group[name] = None  # also in the place of a tensor, in which 0 is no limit that is off
        elif name == "betas":
            three = zip(BETAS, group["betas"], value, strict=True)
            group["betas"] = tuple(_loaded_rate(group, beta, present, now) for beta, present, now in three)
        elif name in RATES:
            group[name] = _loaded_rate(group, name, group[name], value)
        else:
            group[name] = value
    group.update(extra)


def _loaded_rate(group: ParamGroup, name: str, present: Any, value: Any) -> Any:
    """One of `RATES` after a load: a schedule stays, and a tensor takes the saved number."""
    if isinstance(present, Schedule):
        return present
    if isinstance(present, Tensor) and present is group.outputs.get(name):
        group.show(name, float(value))
        return present
    if isinstance(present, Tensor) and value is not None:
        present.detach().fill_(float(value))
        return present
    return float(value) if name in SCHEDULABLE else value


def _completed(pairs: list[tuple[ParamGroup, dict[str, Any]]], states: list[Any]) -> int:
    """The saved count of updates: the largest there is, since torch's AdamW counts on in the parameters alone."""
    counts = [int(float(state["step"])) for state in states if state]
    for _, saved in pairs:
        found = [saved[key] for key in SCHEDULE_KEYS if isinstance(saved.get(key), dict)]
        counts += [int(schedule["step"]) for schedule in found if schedule.get("type") != "Clocked"]
    return max(counts, default=0)


def _clock_counts(pairs: list[tuple[ParamGroup, dict[str, Any]]]) -> dict[Clock, int]:
    """The saved counts of the clocks that the schedules are at; warns where there is none."""
    counts: dict[Clock, int] = {}
    clocked: dict[Clock, str] = {}
    for index, (group, saved) in enumerate(pairs):
        for name, schedule in group.schedules():
            if not isinstance(schedule, Clocked):
                continue
            clock, before = schedule.clock, saved.get(f"{name}_schedule")
            if name == "average_decay" and isinstance(saved.get("average"), dict):
                before = saved["average"].get("decay")
            clocked.setdefault(clock, f"param_groups[{index}]['{name}_schedule']")
            if isinstance(before, dict) and before.get("type") == "Clocked":
                counts[clock] = max(counts.get(clock, 0), int(before["step"]))
    for clock in clocked.keys() - counts.keys():
        warnings.warn(
            f"the loaded state dict has no count of the clock of {clocked[clock]}, which stays at {clock.count}; "
            "optimizer.advance(clock, n) brings it to where the run is",
            stacklevel=4,
        )
    return counts


def _checked_edits(group: ParamGroup, saved: dict[str, Any], index: int) -> dict[str, _Edits]:
    """The saved edits of each schedule of the group; warns where the saved schedule is another one."""
    edits: dict[str, _Edits] = {}
    for name in RATES:
        now, before = group.schedule(name), saved.get(f"{name}_schedule")
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
            setting = shown_name(name)
            warnings.warn(
                f"the checkpoint's {setting} was driven by a schedule, {before.get('type')}; this optimizer has a "
                f"fixed {setting}, which goes on from {saved_rate(saved, name)!r}. Give the constructor "
                f"{setting}={before.get('type')}(...) to go on with a schedule, or write another number into the "
                "groups now.",
                stacklevel=4,
            )
            continue
        if found is not None:
            edits[name] = found
        for difference in schedule_edits.differences(f"{name}_schedule", now.to_dict(), before):
            warnings.warn(difference, stacklevel=4)
    return edits


def _checked_schedule(now: Schedule | None, before: Any, name: str) -> _Edits | None:
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
    saved = Schedule.from_dict({key: value for key, value in before.items() if key not in _BESIDE})
    if type(unclocked(saved)) is not type(unclocked(now)):
        return None
    return (
        schedule_edits.checked_edits(now, before.get("edits"), f"{name}['edits']"),
        schedule_edits.checked_pieces(before.get("pieces"), f"{name}['pieces']"),
        schedule_edits.checked_reports(before.get("reports"), f"{name}['reports']"),
    )
