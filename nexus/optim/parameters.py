"""What a kernel can take of a parameter and its gradient; what it cannot is said clearly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus.arguments import shown
from nexus.backends import sharding
from nexus.backends.records import FLOAT_DTYPES
from nexus.backends.sharding import is_spread, local
from nexus.optim.remedies import check_params


def is_trained(param: Tensor) -> bool:
    """Whether a step may update a parameter. Any other may be of whatever kind, as quantized weights are."""
    return param.requires_grad or param.grad is not None


def check_parameter(param: Tensor, where: str) -> None:
    """Refuse a parameter that no kernel can update. `where` names it in the error."""
    if is_lazy(param):
        raise TypeError(f"{where} is not initialized yet; run the lazy module once before making the optimizer")
    if is_spread(param):
        sharding.check_spread(param, where)
        param = local(param)
    if is_traceable_wrapper_subclass(param):
        raise TypeError(f"{where} is a {type(param).__name__}; FusedAdamW takes plain tensors and DTensors of such")
    if param.layout != torch.strided:
        raise TypeError(f"{where} has the layout {param.layout}; FusedAdamW takes dense (strided) tensors")
    if param.dtype not in FLOAT_DTYPES:
        hint = "; optimize torch.view_as_real(p)" if param.is_complex() else ""
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{where} is of {param.dtype}; FusedAdamW takes {names}{hint}")
    if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
        raise ValueError(f"{where} is an expanded tensor, whose elements share memory; pass p.clone()")
    if param.is_neg():
        raise TypeError(f"{where} is a negated view, whose memory has the other sign; pass p.resolve_neg()")


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
    if is_freed(local(param)):
        raise RuntimeError(f"{where} has no memory, and a gradient: its storage was freed")
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{where} has a gradient of layout {grad.layout}: FusedAdamW does not support sparse gradients; "
            "use torch.optim.SparseAdam for it, or a dense gradient (sparse=False)"
        )
    if grad.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{where} has a gradient of {grad.dtype}, which FusedAdamW does not support")
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{where} of shape {tuple(param.shape)} on {param.device} has a gradient of shape "
            f"{tuple(grad.shape)} on {grad.device}"
        )
    if is_spread(param) or is_spread(grad):
        sharding.check_spread_gradient(param, grad, where)
        grad = local(grad)
    if is_freed(grad) and not grad._is_zerotensor() and not is_traceable_wrapper_subclass(grad):
        raise RuntimeError(f"{where} has a gradient without memory: its storage was freed")


def is_freed(tensor: Tensor) -> bool:
    """Whether the elements of a tensor have no memory."""
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor is dense, and its elements are there to be read."""
    return tensor.layout == torch.strided and not tensor.is_meta and not is_freed(local(tensor))


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
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]), reverse=True)
    return tensor.permute(order).is_contiguous()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i of one block of memory belongs to element i of the other."""
    return all(
        size <= 1 or a_stride == b_stride
        for size, a_stride, b_stride in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def named_parameters(groups: Sequence[dict[str, Any]], first: int = 0) -> Iterator[tuple[int, Tensor, str]]:
    """(index of the group, parameter, its name in an error); `first` is the index of the first of `groups`."""
    for index, group in enumerate(groups, first):
        names = group.get("param_names", ())
        for i, param in enumerate(group["params"]):  # of which some may have been added by hand
            yield index, param, f"parameter {names[i] if i < len(names) else i} of group {index}"


def listed_parameters(param_group: object) -> tuple[list[Any], list[Any]]:
    """Of a group that is to be added, the parameters as they are given, in a list; and without their names.

    Raises:
        TypeError, ValueError: it is none, or has a parameter twice.
    """
    if not isinstance(param_group, dict):
        raise TypeError(f"param_group must be a dict, got {shown(param_group)}")
    if "params" not in param_group:
        raise ValueError(f"param_group must have the key 'params', got {sorted(map(str, param_group))}")
    params = param_group["params"]
    check_params(params)
    params = [params] if isinstance(params, Tensor) else params
    if isinstance(params, set) or not isinstance(params, Iterable):
        raise TypeError(f"params must be a tensor or an ordered iterable of tensors, got {shown(params)}")
    params = list(params)
    tensors = [item[1] if isinstance(item, tuple) and len(item) == 2 else item for item in params]
    first: dict[int, int] = {}
    for index, tensor in enumerate(tensors):
        if first.setdefault(id(tensor), index) != index:
            raise ValueError(
                f"a parameter is twice in this group, as number {first[id(tensor)]} and as number {index}, and "
                "would be updated twice in each step; give tied weights once, as parameters() of the model does"
            )
    return params, tensors
