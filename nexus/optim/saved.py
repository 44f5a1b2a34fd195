"""The state of a parameter in a state dict: as it is saved, checked and loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus.arguments import MAX_STEP, shown
from nexus.backends import codecs, sharding
from nexus.backends.codecs import SCALED, flat
from nexus.backends.interface import STATE_NAMES
from nexus.backends.sharding import local, respread
from nexus.optim.parameters import has_memory, is_freed
from nexus.optim.state import (
    AVERAGES,
    CODES,
    MOMENTS,
    REQUIRED,
    check_scale,
    complete_states,
    is_complete,
    is_shared,
    scale_name,
    split_master,
    value_of,
    weight_of,
)
from nexus.optim.storage import Storage, moment_dtype

SAVED_NAMES = (*STATE_NAMES, "master_param")


def has_codes(state: object) -> bool:
    """Whether this is a state of which something is stored in a way that no other optimizer reads."""
    return is_complete(state) and any(name in state for name in STATE_NAMES[5:])  # type: ignore[operator]


def saved_state(param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as it is saved: with moments in the type of the arithmetic, and a whole master weight."""
    scaled = [
        name for name in AVERAGES if isinstance(state.get(name), Tensor) and state[name].dtype != moment_dtype(param)
    ]
    if not scaled and "master_low" not in state:
        return state
    read = [state[name] for name in STATE_NAMES[1:] if isinstance(state.get(name), Tensor)]
    low = state.get("master_low")
    if low is not None:
        read.append(param)
    if not all(map(has_memory, read)) or (low is not None and low.shape != param.shape):
        raise RuntimeError(
            f"the state of a parameter of shape {tuple(param.shape)} cannot be decoded: it, or the parameter, has no "
            "memory or another shape than it had. Bring back what was offloaded before state_dict(), or "
            "`del optimizer.state[p]`"
        )
    saved = {name: value for name, value in state.items() if name not in STATE_NAMES[5:]}
    for name in scaled:
        saved[name] = value_of(state[name], state.get(scale_name(name)))
        saved[name] = saved[name].to(moment_dtype(param))
    if "master_low" in state:
        master = saved_master(state, param)
        assert master is not None
        saved["master_param"] = sharding.spread_like(param, master)
    return saved


def check_saved(state: Any, param: Tensor, key: Any, storage: Storage) -> None:
    """Raise where the saved state of a parameter, `state[key]`, does not fit it."""
    if state is None or (isinstance(state, dict) and not state):
        return
    where = f"state[{key!r}] of the loaded state dict"
    if param.is_meta:
        raise ValueError(f"{where} is of a parameter on the meta device: give the model memory before the load")

    def refusal(problem: str) -> ValueError:
        return ValueError(
            f"{where}{problem}. Without the entry, the parameter begins anew, with a count and moments of 0"
        )

    present = state if isinstance(state, dict) else {}
    names = STATE_NAMES[:4] if storage.amsgrad or "max_exp_avg_sq" in present else REQUIRED
    missing = ", ".join(name for name in names if name not in present)
    if missing:
        given = str(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        raise refusal(
            f" must have {', '.join(names)}, got {given}; was it another optimizer's? Put in what is missing "
            f"({missing}) if there are these numbers"
        )
    averages = ("average",) if storage.average is not None and present.get("average") is not None else ()
    for name in (*names[1:], *averages):
        moment = state[name]
        if not isinstance(moment, Tensor) or moment.shape != param.shape:
            given = str(tuple(moment.shape)) if isinstance(moment, Tensor) else type(moment).__name__
            raise refusal(f": {name} must be of shape {tuple(param.shape)}, got {given}; another model's, perhaps")
        is_code = moment.dtype == CODES.get(name)
        if moment.layout != torch.strided or not (is_code or moment.is_floating_point()) or moment.is_meta:
            raise refusal(
                f": {name} must be dense, of floating point and not on meta, got {moment.dtype}, {moment.layout} on "
                f"{moment.device}"
            )
        if is_freed(local(moment)):
            raise refusal(f": {name} has no memory: its storage was freed")
        if is_code:
            scale = state.get(scale_name(name))
            check_scale(moment, scale, f"{where}: {name}")
            if bool((scale < 0).any()):
                raise refusal(f": {scale_name(name)} is negative somewhere, which no largest magnitude is")
            continue
        wide = local(moment) if moment.dtype.itemsize > 1 else local(moment).float()  # float8 has no comparison
        if name not in ("exp_avg", "average") and bool((wide < 0).any()):
            raise refusal(f": {name} is negative somewhere, which no average of squares is")
    check_master(state, param, storage, where)
    step = state["step"]
    if isinstance(step, Tensor) and (step.numel() != 1 or step.is_meta):
        raise refusal(
            f": step must have one element, and not be on meta, got the shape {tuple(step.shape)} on {step.device}"
        )
    try:
        in_range = 0 <= float(step) <= MAX_STEP  # may be an average of several
    except (TypeError, ValueError, RuntimeError, OverflowError):
        in_range = False
    if not in_range:
        raise refusal(f": step must be from 0 to 2**53, got {shown(step)}")


@torch.no_grad()
def saved_master(saved: dict[str, Any], param: Tensor) -> Tensor | None:
    """The part here of a saved float32 master weight; None where there is none."""
    weight = saved.get("master_param")
    if saved.get("master_low") is not None:  # of a compact state dict
        return weight_of(param, saved)
    return None if weight is None else respread(weight.detach(), param).to(local(param).device)


def check_master(saved: dict[str, Any], param: Tensor, storage: Storage, where: str) -> None:
    """Raise where the master weight in the saved state of a parameter does not fit that parameter."""
    weight, low = saved.get("master_param"), saved.get("master_low")
    for name, value, dtypes in (
        ("master_param", weight, (torch.float32,)),
        ("master_low", low, tuple(codecs.LOW_DTYPES.values())),
    ):
        if value is not None and (
            not isinstance(value, Tensor)
            or value.shape != param.shape
            or value.dtype not in dtypes
            or not has_memory(value)
        ):
            given = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else shown(value)
            raise ValueError(
                f"{where}: {name} must be of shape {tuple(param.shape)} and of {dtypes[0]}, with memory, got "
                f"{given}; delete the entry to go on from the parameter as it is"
            )
    if storage.master_low is None or (weight is None and low is None):
        return
    if not has_memory(param):
        raise ValueError(f"{where} has a master weight, and its parameter no memory: bring it back before the load")
    if weight is None:
        return
    master = saved_master(saved, param)
    assert master is not None
    upper = local(param).detach()
    _, same = codecs.low_bits(master.contiguous().view(-1), upper.contiguous().view(-1), storage.master_low)
    if not bool(same.all()):
        raise ValueError(
            f"{where}: master_param is not what the parameter is rounded from, in {int((~same).sum())} of "
            f"{same.numel()} elements: the model has other weights than it was saved with. Load the model's weights "
            "before the optimizer's state; or delete master_param from the state dict to go on from the parameter as "
            "it is; or call optimizer.load_master() with the float32 weights after that, to take these"
        )


def loaded(
    param: Tensor, present: Any, saved: dict[str, Any] | None, storage: Storage, where: str, *, in_place: bool
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
        if "average" in kept:
            local(kept["average"]).copy_(weight_of(param, kept))
        return kept or None
    if any(kept[name].shape != param.shape for name in MOMENTS if name in kept):
        kept = {}  # of the shape that the parameter had before
    del present  # what is not kept is freed before its successor is made
    complete_states([(kept, param, where, storage._replace(amsgrad="max_exp_avg_sq" in saved))])
    kept["step"].fill_(float(saved["step"]))
    averages = ("average",) if "average" in kept and saved.get("average") is not None else ()
    for name in (*MOMENTS, *averages):
        if name not in saved:
            kept.pop(name, None)  # of an amsgrad that is over
            kept.pop(scale_name(name), None)
            continue
        stored = local(kept[name])
        value = respread(value_of(saved[name].detach(), saved.get(scale_name(name))), param)
        if stored.dtype in SCALED:
            value = torch.empty_like(stored, dtype=torch.float32).copy_(value)
            codes, scale = codecs.encoded(flat(value), stored.dtype)
            assert scale is not None
            flat(stored).copy_(codes)
            kept.setdefault(scale_name(name), scale).copy_(scale)
        else:
            stored.copy_(value)
    if "master_low" in kept:
        low = local(kept["master_low"])
        master = saved_master(saved, param)
        low.zero_()
        if master is not None:
            split_master(low, param, master)
    if "average" in kept and not averages:  # it begins as the parameter is
        local(kept["average"]).copy_(weight_of(param, kept))
    return kept
