"""Turns the optimizer's parameters into what a kernel can take, and says clearly what it cannot take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus.backends.interface import TensorEntry
from nexus.backends.shards import is_spread, local
from nexus.optim import shards

PARAM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_ALIGNMENT = 32  # elements: at least 128 bytes, the widest access of any kernel
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def check_parameter(param: Tensor, where: str) -> None:
    """Refuse a parameter that no kernel can update. `where` names it in the error."""
    if is_lazy(param):
        raise TypeError(f"{where} is not initialized yet; run the lazy module once before making the optimizer")
    if is_spread(param):
        shards.check_spread(param, where)
        param = local(param)
    if is_traceable_wrapper_subclass(param):
        raise TypeError(f"{where} is a {type(param).__name__}; FusedAdamW takes plain tensors and DTensors of such")
    if param.layout != torch.strided:
        raise TypeError(f"{where} has the layout {param.layout}; FusedAdamW takes dense (strided) tensors")
    if param.dtype not in PARAM_DTYPES:
        hint = "; optimize torch.view_as_real(p)" if param.is_complex() else ""
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in PARAM_DTYPES)
        raise TypeError(f"{where} is of {param.dtype}; FusedAdamW takes {names}{hint}")
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(f"{where} is an expanded tensor, whose elements share memory; pass p.clone()")
    if param.is_neg():
        raise TypeError(f"{where} is a negated view, whose memory has the other sign; pass p.resolve_neg()")
    if is_freed(param):
        raise RuntimeError(f"{where} has no memory: its storage was freed")


def check_memory(params: list[tuple[str, Tensor]]) -> None:
    """Refuse to step what has no memory: a gradient on the meta device, or nothing but parameters there."""
    on_meta = [(name, param.grad is not None) for name, param in params if param.is_meta]
    for name, has_gradient in on_meta:
        if has_gradient or len(on_meta) == len(params):
            raise RuntimeError(
                f"{name} is on the meta device and cannot be updated. model.to_empty() makes other parameters: make "
                "the optimizer after it, or call torch.__future__.set_swap_module_params_on_conversion(True) before"
            )


def check_gradient(param: Tensor, where: str) -> None:
    """Refuse a gradient that no kernel can read."""
    grad = param.grad
    if grad is None:
        return
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{where} has a gradient of layout {grad.layout}: FusedAdamW does not support sparse gradients; "
            "use torch.optim.SparseAdam for it, or a dense gradient (sparse=False)"
        )
    if grad.dtype not in PARAM_DTYPES:
        raise TypeError(f"{where} has a gradient of {grad.dtype}, which FusedAdamW does not support")
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{where} of shape {tuple(param.shape)} on {param.device} has a gradient of shape "
            f"{tuple(grad.shape)} on {grad.device}"
        )
    if is_spread(param) or is_spread(grad):
        shards.check_spread_gradient(param, grad, where)
        grad = local(grad)
    if grad.is_neg():
        raise TypeError(f"{where} has a gradient that is a negated view; set p.grad = p.grad.resolve_neg()")
    if is_freed(grad):
        raise RuntimeError(f"{where} has a gradient without memory: its storage was freed")


def is_freed(tensor: Tensor) -> bool:
    """Whether the elements of a tensor have no memory."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def check_sharing(params: list[tuple[str, Tensor]]) -> None:
    """Refuse parameters of which two elements are one place in memory, where some are not dense.

    Of parameters that are, a backend sees it by their addresses.
    """
    params = [(name, local(param)) for name, param in params]
    if all(is_dense(param.detach()) for _, param in params):
        return
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, param in params:
        if param.numel():
            by_storage.setdefault(param.untyped_storage().data_ptr(), []).append((name, param))
    for sharers in by_storage.values():
        if all(is_dense(param.detach()) for _, param in sharers):
            continue
        taken = torch.zeros(sharers[0][1].untyped_storage().nbytes(), dtype=torch.bool, device="cpu")
        for name, param in sharers:
            size = param.element_size()
            mine = taken.as_strided(
                (*param.shape, size), (*(size * s for s in param.stride()), 1), size * param.storage_offset()
            )
            first = size * param.storage_offset()
            extent = 1 + sum((n - 1) * stride for n, stride in zip(param.shape, param.stride(), strict=True))
            around = taken[first : first + size * extent]
            before = int(around.sum())
            mine.fill_(True)
            if int(around.sum()) - before != param.numel() * size:
                others = ", ".join(other for other, _ in sharers if other != name) or "itself"
                raise ValueError(f"{name} shares memory with {others}; give the optimizer one tensor for both")


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory, in any order of the dimensions."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]), reverse=True)
    return tensor.permute(order).is_contiguous()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i of one block of memory belongs to element i of the other."""
    return all(
        size <= 1 or a_stride == b_stride
        for size, a_stride, b_stride in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def make_entry(param: Tensor, state: dict[str, Any], group: int, *, amsgrad: bool, where: str) -> TensorEntry:
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
    if grad is not None and not (shards.is_read_in_place(grad, param) and same_layout(local(grad), target)):
        grad_buffer = torch.empty_like(target, dtype=grad.dtype)
    return TensorEntry(
        original=param,
        group=group,
        param_buffer=param_buffer,
        grad_buffer=grad_buffer,
        exp_avg=local(state["exp_avg"]),
        exp_avg_sq=local(state["exp_avg_sq"]),
        max_exp_avg_sq=local(state["max_exp_avg_sq"]) if amsgrad else None,
        step=state["step"],
    )


def moment_dtype(param: Tensor) -> torch.dtype:
    """Of the moments and of the arithmetic: float32 for half precision, the parameter's own otherwise."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@torch.inference_mode(False)  # the state outlives a mode in which the first step may be made
def complete_states(states: list[tuple[Tensor, dict[str, Any], bool]]) -> None:
    """Fill in what is missing of (parameter, its state, amsgrad): a count of 0, moments of 0.

    What is new shares one block of memory for each type and device: a step then has few blocks to keep an eye on
    (about 20 ns each), and allocation and page faults are few. Counters of torch's (float32) become int64.
    """
    wanted: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, dict[str, Any], str]]] = {}
    for param, state, _ in states:
        step = state.get("step")
        if step is None:
            wanted.setdefault((param.device, torch.int64), []).append((param, state, "step"))
        elif not isinstance(step, Tensor) or step.dtype != torch.int64 or step.device != param.device or step.dim():
            count = step.detach() if isinstance(step, Tensor) else int(step)  # never of torch's default types
            state["step"] = torch.as_tensor(count, device=param.device).to(torch.int64).reshape(())
    for index, name in enumerate(MOMENTS):
        for param, state, amsgrad in states:
            if name not in state and (amsgrad or index < 2):
                wanted.setdefault((param.device, moment_dtype(param)), []).append((param, state, name))
    for (device, dtype), new in wanted.items():
        parts = [local(param).detach() for param, _, _ in new]
        padded = [
            1 if name == "step" else -(-part.numel() // _ALIGNMENT) * _ALIGNMENT
            for part, (_, _, name) in zip(parts, new, strict=True)
        ]
        block = torch.zeros(sum(padded), dtype=dtype, device=device)
        for (param, state, name), part, memory in zip(new, parts, torch.split(block, padded), strict=True):
            if name == "step":
                state[name] = memory[0]
            else:
                moment = memory.as_strided(part.shape, _dense_stride(part))
                state[name] = shards.spread_like(param, moment)


def _dense_stride(param: Tensor) -> tuple[int, ...]:
    """The layout that the kernels want beside this parameter: its own, or contiguous."""
    if is_dense(param):
        return param.stride()
    return torch.empty(param.shape, device="meta").stride()


def _fitting_moment(moment: Any, param: Tensor, target: Tensor, where: str) -> Tensor:
    if not isinstance(moment, Tensor) or moment.shape != param.shape or moment.device != target.device:
        given = f"{tuple(moment.shape)} on {moment.device}" if isinstance(moment, Tensor) else type(moment).__name__
        raise ValueError(f"{where} must be of shape {tuple(param.shape)} on {target.device}, got {given}")
    dtype = moment_dtype(target)
    if shards.same_spread(moment, param):
        part = local(moment)
        if part.dtype == dtype and is_dense(part) and same_layout(part, target):
            return moment
    fitting = torch.empty_like(target, dtype=dtype).copy_(shards.respread(moment, param))
    return shards.spread_like(param, fitting)
