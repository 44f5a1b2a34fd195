"""The state of parameters: made, stored as wanted, laid out for the kernels, and handed over as streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus.arguments import shown
from nexus.backends import codecs, say_once, sharding
from nexus.backends.codecs import SCALE_BLOCK, SCALED, flat
from nexus.backends.interface import STATE_NAMES, StateStreams, TensorEntry
from nexus.backends.sharding import local, respread
from nexus.optim.parameters import has_memory, is_dense, is_freed, same_layout
from nexus.optim.storage import Storage, moment_dtype

REQUIRED = STATE_NAMES[:3]  # without one of these, there is no state yet
MOMENTS = STATE_NAMES[1:4]
AVERAGES = STATE_NAMES[1:5]  # with that of the parameter
CODES = {name: torch.int8 if name == "exp_avg" else torch.uint8 for name in MOMENTS}


def scale_name(moment: str) -> str:
    """The key of a moment's scales in the state."""
    return f"{moment}_scale"


def make_entry(param: Tensor, state: dict[str, Any], group: int, ordinal: int, storage: Storage) -> TensorEntry:
    """The streams of a parameter whose `state` is complete (see `complete_states`).

    State tensors that were put there by hand, or are stored otherwise than `storage` says, are made anew as it says,
    and laid out as the parameter is. `check_streams` has refused what does not fit.
    """
    target = local(param).detach()
    param_buffer = None if is_dense(target) else torch.empty(target.shape, dtype=param.dtype, device=param.device)
    target = target if param_buffer is None else param_buffer
    if storage.average is None:
        state.pop("average", None)
    for name in AVERAGES:
        if name in state:
            _fit_moment(state, name, storage, param, target)
    fit_master(state, storage, param, target)
    grad, grad_buffer = param.grad, None
    if grad is not None and not (_is_readable(grad, param) and same_layout(local(grad), target)):
        grad_buffer = torch.empty_like(target, dtype=grad.dtype)
    has_scales = any(scale_name(name) in state for name in MOMENTS)
    by_chance = has_scales or storage.stochastic_rounding or torch.bfloat16 in (storage.exp_avg_sq, storage.average)
    first = sharding.first_element(param) if by_chance else 0
    if by_chance and not sharding.begins_a_block(param, first, SCALE_BLOCK if has_scales else 1):
        say_once(
            "an element is rounded by the chance of its place in the whole tensor, and 8-bit moments share a scale "
            f"in blocks of {SCALE_BLOCK} elements of it: this process's part of a parameter is of columns, or begins "
            "within a block, and is counted by itself. Results depend on the number of processes"
        )
    used = [name for name in STATE_NAMES if storage.amsgrad or not name.startswith("max_")]
    streams = {name: local(state[name]) if name in used and name in state else None for name in STATE_NAMES}
    return TensorEntry(
        original=param,
        group=group,
        param_buffer=param_buffer,
        grad_buffer=grad_buffer,
        state=StateStreams(**streams | {"step": state["step"].reshape(())}),
        ordinal=ordinal,
        first=first,
        stochastic_rounding=storage.stochastic_rounding,
    )


def _is_readable(grad: Tensor, param: Tensor) -> bool:
    """Whether the memory of a gradient holds what it says, where it is: not that of a negated view."""
    part = local(grad)
    has_memory = not part._is_zerotensor() and not is_traceable_wrapper_subclass(part)
    return sharding.is_read_in_place(grad, param) and has_memory and not part.is_neg()


def is_complete(state: object) -> bool:
    """Whether this is the state of a parameter. What is empty, or a part of one, is none yet, whoever made it."""
    return isinstance(state, dict) and all(state.get(name) is not None for name in REQUIRED)


@torch.inference_mode(False)  # the state outlives a mode in which the first step may be made
def complete_states(states: list[tuple[dict[str, Any], Tensor, str, Storage]]) -> None:
    """Fill in what is missing of each (state, its parameter, the name of that in an error, how it is stored): zeros.

    Keys that are not a state's own are the user's. A count of another type, such as torch's float32, which sticks at
    2**24, becomes float64.
    """
    for state, param, where, storage in states:
        if storage.master_low is None:
            state.pop("master_param", None)  # loaded while the parameter was frozen, and soon another weight's
        if not is_complete(state):
            # A moment without its count, or without the other moment, would make an update of any size.
            for name in STATE_NAMES:
                _check_unshared(state.get(name), f"{where}: state {name!r}, beside which another is missing,")
                state.pop(name, None)
            state["step"] = torch.zeros((), dtype=torch.float64, device=param.device)
        step = state["step"]
        if (
            not isinstance(step, Tensor)
            or step.dtype != torch.float64
            or step.device != param.device
            or step.numel() != 1
        ):
            check_unshared(state, param, where)
            count = step.detach() if isinstance(step, Tensor) else float(step)  # never of torch's default types
            state["step"] = torch.as_tensor(count, dtype=torch.float64, device=param.device).reshape(())
        _check_memory(state["step"], f"{where}: state 'step'")
    # One after the other: a step goes through each in the parameters' order. An average begins as the weight is.
    for name in (*MOMENTS, "master_low", "average"):
        lacking = []
        for state, param, _, storage in states:
            dtype = storage.streams().get(name)
            is_there = name != "average" or not is_freed(local(param))  # what it begins as
            if dtype is not None and is_there and state.get(name) is None:
                stream = torch.empty(0, dtype=dtype, device=local(param).device)
                lacking.append((state, param, stream))
        # Their memory comes once all tensors are made, so that it lies together: 1,000 small ones step 10% faster.
        for state, param, stream in lacking:
            part = local(param).detach()
            stream.resize_(part.numel()).zero_().as_strided_(part.shape, _dense_stride(part))
            state[name] = sharding.spread_like(param, stream)
            if name == "master_low":  # from here on, the weight is what the parameter is
                weight = state.pop("master_param", None)
                if isinstance(weight, Tensor) and weight.shape == param.shape:  # loaded while it was frozen
                    split_master(stream, param, respread(weight.detach(), param))
            if name == "average":
                stream.copy_(weight_of(param, state))
            if name in MOMENTS and stream.dtype in SCALED:
                count = codecs.scale_count(part.numel())
                state[scale_name(name)] = torch.zeros(count, dtype=torch.float32, device=part.device)


def _check_memory(value: Tensor, where: str) -> None:
    if is_freed(local(value)):
        raise RuntimeError(f"{where} has no memory: its storage was freed. Bring it back before the step")


def is_shared(tensor: Tensor) -> bool:
    """Whether other processes may see a tensor's memory. torch says so of all that is on a GPU."""
    return tensor.device.type == "cpu" and bool(local(tensor).is_shared())  # type: ignore[no-untyped-call]


def check_unshared(state: object, param: Tensor, where: str) -> None:
    """Refuse a state of which something would have to be replaced that other processes see."""
    if not isinstance(state, dict):
        return
    step = state.get("step")
    if isinstance(step, Tensor) and (step.dtype != torch.float64 or step.numel() != 1):
        _check_unshared(step, f"{where}: state 'step'", "of torch.float64 and one element")
    for name in AVERAGES:
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.shape != param.shape:
            _check_unshared(moment, f"{where}: state {name!r}", _like(moment_dtype(param)))


def _like(dtype: torch.dtype) -> str:
    return f"of {dtype}, laid out as the parameter"


def _check_unshared(value: object, where: str, fitting: str = "") -> None:
    """Refuse to replace a tensor that other processes see; `fitting` says which would not have to be."""
    if isinstance(value, Tensor) and is_shared(value):
        remedy = f"Share one {fitting}" if fitting else "Share all of it"
        raise TypeError(
            f"{where} is in shared memory, and would have to be replaced by a tensor that this process alone sees: "
            f"it is of {value.dtype} and shape {tuple(value.shape)}. {remedy}"
        )


def _dense_stride(param: Tensor) -> tuple[int, ...]:
    """The layout that the kernels want beside this parameter: its own, or contiguous."""
    if is_dense(param):
        return param.stride()
    return torch.empty(param.shape, device="meta").stride()


def check_streams(state: dict[str, Any], storage: Storage, param: Tensor, where: str) -> None:
    """Raise where moments or low bits in a complete state can not be brought into the form that `storage` says."""
    part = local(param).detach()
    for name in AVERAGES:
        if name not in state or (name == "average" and storage.average is None):
            continue
        moment, scale, what = state[name], state.get(scale_name(name)), f"{where}: state {name!r}"
        if not isinstance(moment, Tensor) or moment.shape != param.shape or moment.device != part.device:
            given = (
                f"{tuple(moment.shape)} on {moment.device}" if isinstance(moment, Tensor) else type(moment).__name__
            )
            raise ValueError(f"{what} must be of shape {tuple(param.shape)} on {part.device}, got {given}")
        _check_memory(moment, what)
        if moment.dtype in SCALED and moment.dtype != CODES.get(name):
            allowed = f"{CODES.get(name, torch.bfloat16)} or float32"
            raise ValueError(f"{what} may be of {allowed}, got {moment.dtype}, which are other codes")
        check_scale(moment, scale, what)
        dtype = storage.streams().get(name, storage.exp_avg_sq)
        if not _fits(moment, dtype, param):
            for each in (moment, scale):
                _check_unshared(each, what, _like(dtype))
    low = state.get("master_low")
    if low is not None and storage.master_low is not None:
        bits = local(low) if isinstance(low, Tensor) else None
        if (
            bits is None
            or (bits.shape, bits.device) != (part.shape, part.device)
            or bits.dtype not in codecs.LOW_DTYPES.values()
            or not has_memory(bits)
        ):
            raise ValueError(
                f"{where}: state 'master_low' must be of shape {tuple(param.shape)} and as nexus made it, got "
                f"{shown(low)}; delete it to go on from the parameter as it is"
            )
        if not _fits(low, storage.master_low, param):
            _check_unshared(low, f"{where}: state 'master_low'", _like(storage.master_low))


def _fits(stored: Tensor, dtype: torch.dtype, param: Tensor) -> bool:
    """Whether a stream is stored as `dtype`, spread as the parameter, and laid out as a kernel wants it."""
    if not sharding.same_spread(stored, param):
        return False
    part, beside = local(stored), local(param)
    strides = zip(part.shape, part.stride(), _dense_stride(beside), strict=True)
    same = part.shape == beside.shape and all(size <= 1 or given == wanted for size, given, wanted in strides)
    return part.dtype == dtype and is_dense(part) and same


def _fit_moment(state: dict[str, Any], name: str, storage: Storage, param: Tensor, target: Tensor) -> None:
    """See to it that a moment, which is checked, is stored as `storage` says, and laid out as `target`."""
    moment, scale = state[name], state.get(scale_name(name))
    dtype = storage.streams().get(name, storage.exp_avg_sq)  # of a maximum that nobody wants any more, too
    if _fits(moment, dtype, param):
        if dtype not in SCALED:
            state.pop(scale_name(name), None)
        return
    value = torch.empty_like(target, dtype=moment_dtype(target)).copy_(respread(value_of(moment, scale), param))
    stored, scale = codecs.encoded(flat(value), dtype)
    state[name] = sharding.spread_like(param, stored.as_strided(value.shape, value.stride()))
    state.pop(scale_name(name), None)
    if scale is not None:
        state[scale_name(name)] = scale


def check_scale(moment: Tensor, scale: object, where: str) -> None:
    """Refuse a moment in 8 bits without the scales that belong to it, in a row beside it."""
    if moment.dtype not in SCALED:
        return
    part = local(moment)
    count = codecs.scale_count(part.numel())
    if (
        not isinstance(scale, Tensor)
        or (scale.shape, scale.dtype, scale.device) != ((count,), torch.float32, part.device)
        or not has_memory(scale)
        or not scale.is_contiguous()
    ):
        given = f"{tuple(scale.shape)} of {scale.dtype}" if isinstance(scale, Tensor) else shown(scale)
        raise ValueError(
            f"{where} is of {moment.dtype}, and needs {count} scales of float32 beside it, contiguous on "
            f"{part.device}, got {given}: put them there, or give the moment in float32"
        )


def value_of(moment: Tensor, scale: Tensor | None) -> Tensor:
    """A moment as float32 (float64 as it is), in its own shape and layout, spread as it is."""
    part = local(moment)
    if moment.dtype not in SCALED:
        return moment.detach()
    part = part if is_dense(part) else part.contiguous()
    value = codecs.decoded(flat(part), scale)
    return sharding.spread_like(moment, value.as_strided(part.shape, part.stride()))


def fit_master(state: dict[str, Any], storage: Storage, param: Tensor, target: Tensor) -> None:
    """See to it that the low bits, which are checked, are those that `storage` wants, laid out as `target`."""
    if storage.master_low is None:
        state.pop("master_low", None)
        return
    low = state["master_low"]
    if _fits(low, storage.master_low, param):
        return
    part = local(low)
    upper = torch.empty_like(target).copy_(local(param).detach())
    fitting = torch.empty_like(target, dtype=part.dtype).copy_(part)
    stored, _ = codecs.low_bits(codecs.master(flat(upper), flat(fitting)), flat(upper), storage.master_low)
    state["master_low"] = sharding.spread_like(param, stored.as_strided(target.shape, fitting.stride()))


def weight_of(param: Tensor, state: dict[str, Any]) -> Tensor:
    """The part here of a parameter as the arithmetic has it: its master weight, or itself."""
    part, low = local(param).detach(), state.get("master_low")
    if low is None:
        return part
    upper = torch.empty_like(local(low), dtype=part.dtype).copy_(part)
    return codecs.master(flat(upper), flat(local(low))).as_strided(upper.shape, upper.stride())


def split_master(low: Tensor, param: Tensor, master: Tensor) -> None:
    """Fill in the low bits with which a parameter is nearest to a master weight, where it is that one rounded."""
    upper = torch.empty_like(low, dtype=param.dtype).copy_(local(param).detach())
    weight = torch.empty_like(low, dtype=torch.float32).copy_(master)
    flat(low).copy_(codecs.low_bits(flat(weight), flat(upper), low.dtype)[0])


def is_idle(param: Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter has no gradient, and it or its moments no memory here: offloading takes and brings it."""
    if param.grad is not None:
        return False
    moments = [state[name] for name in AVERAGES if name in state]
    elsewhere = any(each.shape != param.shape or each.device != param.device for each in moments)
    return elsewhere or any(local(each).untyped_storage().nbytes() == 0 for each in (param, *moments))
