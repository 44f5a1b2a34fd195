"""The state of parameters: made, loaded, laid out as the kernels want it, and handed over as streams."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus.arguments import MAX_STEP, shown
from nexus.backends import sharding
from nexus.backends.interface import STATE_NAMES, StateStreams, TensorEntry
from nexus.backends.sharding import local, respread
from nexus.optim.parameters import is_dense, is_freed, same_layout

REQUIRED = STATE_NAMES[:3]  # without one of these, there is no state yet
MOMENTS = STATE_NAMES[1:4]


def make_entry(
    param: Tensor, state: dict[str, Any], group: int, ordinal: int, *, amsgrad: bool, where: str
) -> TensorEntry:
    """The streams of a parameter whose `state` is complete (see `complete_states`).

    State tensors that were put there by hand are laid out as the parameter is; what does not fit is an error.
    """
    target = local(param).detach()
    param_buffer = None if is_dense(target) else torch.empty(target.shape, dtype=param.dtype, device=param.device)
    target = target if param_buffer is None else param_buffer
    for name in MOMENTS:
        if name in state:
            state[name] = _fitting_moment(state[name], param, target, f"{where}: state {name!r}")
    grad, grad_buffer = param.grad, None
    if grad is not None and not (_is_readable(grad, param) and same_layout(local(grad), target)):
        grad_buffer = torch.empty_like(target, dtype=grad.dtype)
    return TensorEntry(
        original=param,
        group=group,
        param_buffer=param_buffer,
        grad_buffer=grad_buffer,
        state=StateStreams(
            exp_avg=local(state["exp_avg"]),
            exp_avg_sq=local(state["exp_avg_sq"]),
            max_exp_avg_sq=local(state["max_exp_avg_sq"]) if amsgrad else None,
            exp_avg_scale=None,
            exp_avg_sq_scale=None,
            max_exp_avg_sq_scale=None,
            master_low=None,
            step=state["step"].reshape(()),
        ),
        ordinal=ordinal,
        first=0,
        stochastic_rounding=False,
    )


def _is_readable(grad: Tensor, param: Tensor) -> bool:
    """Whether the memory of a gradient holds what it says, where it is: not that of a negated view."""
    part = local(grad)
    has_memory = not part._is_zerotensor() and not is_traceable_wrapper_subclass(part)
    return sharding.is_read_in_place(grad, param) and has_memory and not part.is_neg()


def moment_dtype(param: Tensor) -> torch.dtype:
    """Of the moments and of the arithmetic: float32 for half precision, the parameter's own otherwise."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def is_complete(state: object) -> bool:
    """Whether this is the state of a parameter. What is empty, or a part of one, is none yet, whoever made it."""
    return isinstance(state, dict) and all(state.get(name) is not None for name in REQUIRED)


@torch.inference_mode(False)  # the state outlives a mode in which the first step may be made
def complete_states(states: list[tuple[dict[str, Any], Tensor, str, bool]]) -> None:
    """Fill in what is missing of each (state, its parameter, the name of that in an error, amsgrad): zeros.

    Keys that are not a state's own are the user's. A count of another type, such as torch's float32, which sticks at
    2**24, becomes float64.
    """
    for state, param, where, _ in states:
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
    for name in MOMENTS:  # one after the other: a step goes through each in the order of the parameters
        lacking = [
            (state, param, torch.empty(0, dtype=moment_dtype(param), device=local(param).device))
            for state, param, _, amsgrad in states
            if name not in state and (amsgrad or name != "max_exp_avg_sq")
        ]
        # Their memory comes once all tensors are made, so that it lies together: 1,000 small ones step 10% faster.
        for state, param, moment in lacking:
            part = local(param).detach()
            moment.resize_(part.numel()).zero_().as_strided_(part.shape, _dense_stride(part))
            state[name] = sharding.spread_like(param, moment)


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
    for name in MOMENTS:
        moment = state.get(name)
        if isinstance(moment, Tensor) and moment.shape != param.shape:
            _check_unshared(moment, f"{where}: state {name!r}", _like(param))


def _like(param: Tensor) -> str:
    return f"of {moment_dtype(param)}, laid out as the parameter"


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


def _fitting_moment(moment: Any, param: Tensor, target: Tensor, where: str) -> Tensor:
    if not isinstance(moment, Tensor) or moment.shape != param.shape or moment.device != target.device:
        given = f"{tuple(moment.shape)} on {moment.device}" if isinstance(moment, Tensor) else type(moment).__name__
        raise ValueError(f"{where} must be of shape {tuple(param.shape)} on {target.device}, got {given}")
    _check_memory(moment, where)
    dtype = moment_dtype(target)
    if sharding.same_spread(moment, param):
        part = local(moment)
        if part.dtype == dtype and is_dense(part) and same_layout(part, target):
            return moment
    _check_unshared(moment, where, _like(param))
    fitting = torch.empty_like(target, dtype=dtype).copy_(respread(moment, param))
    return sharding.spread_like(param, fitting)


def is_idle(param: Tensor, state: dict[str, Any]) -> bool:
    """Whether a parameter has no gradient, and it or its moments no memory here: offloading takes and brings it."""
    if param.grad is not None:
        return False
    moments = [state[name] for name in MOMENTS if name in state]
    elsewhere = any(each.shape != param.shape or each.device != param.device for each in moments)
    return elsewhere or any(local(each).untyped_storage().nbytes() == 0 for each in (param, *moments))


def check_saved(state: Any, param: Tensor, key: Any, *, amsgrad: bool) -> None:
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
    names = STATE_NAMES if amsgrad or "max_exp_avg_sq" in present else REQUIRED
    missing = ", ".join(name for name in names if name not in present)
    if missing:
        given = str(sorted(map(str, state))) if isinstance(state, dict) else shown(state)
        raise refusal(
            f" must have {', '.join(names)}, got {given}; was it another optimizer's? Put in what is missing "
            f"({missing}) if there are these numbers"
        )
    for name in names[1:]:
        moment = state[name]
        if not isinstance(moment, Tensor) or moment.shape != param.shape:
            given = str(tuple(moment.shape)) if isinstance(moment, Tensor) else type(moment).__name__
            raise refusal(f": {name} must be of shape {tuple(param.shape)}, got {given}; another model's, perhaps")
        if moment.layout != torch.strided or not moment.is_floating_point() or moment.is_meta:
            raise refusal(
                f": {name} must be dense, of floating point and not on meta, got {moment.dtype}, {moment.layout} on "
                f"{moment.device}"
            )
        if is_freed(local(moment)):
            raise refusal(f": {name} has no memory: its storage was freed")
        wide = local(moment) if moment.dtype.itemsize > 1 else local(moment).float()  # float8 has no comparison
        if name != "exp_avg" and bool((wide < 0).any()):
            raise refusal(f": {name} is negative somewhere, which no average of squares is")
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


def loaded(
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
