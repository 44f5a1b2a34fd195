"""Parameters that are spread over processes: their parts, their state, and sums over devices and processes.

`torch.distributed` is not imported here before the first tensor of its own comes along.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from nexus.backends.interface import TensorEntry


def is_spread(tensor: Tensor | None) -> TypeIs[DTensor]:
    """Whether a tensor is a DTensor: each process holds a part of it, or a copy."""
    if type(tensor) is Tensor or type(tensor) is Parameter:  # most are, and this is asked often
        return False
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of a DTensor its part, and of any other all."""
    if not is_spread(tensor):
        return tensor
    part: Tensor = tensor._local_tensor
    wait = getattr(part, "wait", None)  # of a collective that may be under way
    return part if wait is None else wait()


def placements(tensor: Tensor) -> tuple[object, ...] | None:
    """How a DTensor is spread over the dimensions of its mesh; None for any other tensor."""
    return tensor.placements if is_spread(tensor) else None


def first_element(tensor: Tensor) -> int:
    """Where the first element that this process holds is in the whole tensor, counted in the order of its memory."""
    if not is_spread(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return sum(offset * stride for offset, stride in zip(offsets, tensor.stride(), strict=True))


def begins_a_block(param: Tensor, first: int, block: int) -> bool:
    """Whether blocks of elements that are counted within this process's part, from `first` on, are the whole's."""
    return not is_spread(param) or (local(param).shape[1:] == param.shape[1:] and first % block == 0)


@torch.no_grad()
def spread_as(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a DTensor once it is spread as `like` is: a collective, where it is not yet."""
    if is_spread(tensor) and is_spread(like):
        tensor = tensor.redistribute(placements=like.placements)
    return local(tensor).detach()


def check_spread(param: DTensor, where: str) -> None:
    """Refuse a DTensor whose part in this process no kernel can update."""
    if param.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{where} is on {param.device_mesh}, to which this process does not belong; leave it out here"
        )
    if any(placement.is_partial() for placement in param.placements):
        raise TypeError(
            f"{where} is a DTensor with the placements {param.placements}, of which no process has an element; "
            "redistribute it to Shard or Replicate first"
        )


def check_spread_gradient(param: Tensor, grad: Tensor, where: str) -> None:
    """Refuse a gradient that is not spread over the same processes."""
    if is_spread(param) != is_spread(grad):
        raise RuntimeError(
            f"{where} is a {type(param.data).__name__} and has a gradient that is a {type(grad).__name__}"
        )
    if is_spread(param) and is_spread(grad) and param.device_mesh != grad.device_mesh:
        raise RuntimeError(f"{where} is on {param.device_mesh} and has a gradient on {grad.device_mesh}")


def is_read_in_place(grad: Tensor, param: Tensor) -> bool:
    """Whether the part of the gradient in this process is that of the parameter, and there already."""
    if not is_spread(grad):
        return True
    return type(grad._local_tensor) is Tensor and placements(grad) == placements(param)


def spread_like(param: Tensor, part: Tensor) -> Tensor:
    """A tensor of the state whose part in this process is `part`, of the same shape as the parameter's."""
    if not is_spread(param):
        return part
    # Not DTensor.from_local: that brings a part which FSDP2 has offloaded back to the mesh's device, and of a part
    # within a block it makes what copy.deepcopy cannot copy.
    spread: DTensor = torch.empty_like(param.detach(), dtype=part.dtype)  # type: ignore[assignment]
    spread._local_tensor = part
    return spread


def same_spread(state: object, param: Tensor) -> bool:
    """Whether a tensor of the state has its parts where the parameter has them."""
    if not isinstance(state, Tensor) or is_spread(state) != is_spread(param):
        return False
    return not (is_spread(state) and is_spread(param)) or (
        state.device_mesh == param.device_mesh and state.placements == param.placements
    )


@torch.no_grad()
def respread(saved: Tensor, param: Tensor) -> Tensor:
    """The part of a saved tensor, of the parameter's whole shape, that belongs beside the parameter's part.

    A collective where the saved tensor is a DTensor that is spread otherwise. A plain one is taken to be whole.
    """
    if not is_spread(param):
        return saved.full_tensor() if is_spread(saved) else saved
    if is_spread(saved):
        if saved.device_mesh != param.device_mesh:
            saved = saved.full_tensor()
        else:
            return local(saved.redistribute(placements=param.placements))
    from torch.distributed.tensor import distribute_tensor

    saved = saved.detach().to(param.device)
    return local(distribute_tensor(saved, param.device_mesh, param.placements, src_data_rank=None))


@dataclass
class NormPart:
    """Parameters whose squares are to be added up over the same processes for the global norm."""

    groups: tuple[ProcessGroup, ...]  # sums are added up over each of these, one after the other
    device: torch.device
    entries: list[TensorEntry]


def norm_parts(
    parameters: list[tuple[Tensor, TensorEntry | None]], norm_group: ProcessGroup | None = None
) -> list[NormPart]:
    """Sort the parameters by the processes that hold parts of them.

    A DTensor's squares are added up over the dimensions of its mesh along which it is sharded; where it is
    replicated, each process has counted them already. A plain tensor's squares are whole.

    Args:
        parameters: with their entries; the same ones on every process, whether they have a gradient or not.
        norm_group: of optimizers that have other parameters of the same model; added to every part.
    """
    if norm_group is None and not any(is_spread(param) for param, _ in parameters):
        return []
    parts: dict[tuple[ProcessGroup, ...], NormPart] = {}
    sizes: dict[tuple[ProcessGroup, ...], int] = {}
    for param, entry in parameters:
        groups = _sharding_groups(param)
        if norm_group is not None:
            groups = (*groups, norm_group)
        part = parts.setdefault(groups, NormPart(groups, param.device, []))
        sizes[groups] = sizes.get(groups, 0) + param.numel()  # of the whole: the same on every process
        if entry is not None:
            part.entries.append(entry)
    if not any(parts):
        return []
    return [parts[groups] for groups in sorted(parts, key=lambda groups: -sizes[groups])]


def _sharding_groups(param: Tensor) -> tuple[ProcessGroup, ...]:
    if not is_spread(param):
        return ()
    mesh = param.device_mesh
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(param.placements)
        if not placement.is_replicate() and mesh.size(dim) > 1
    )


def brought(scalar: Tensor, device: torch.device) -> Tensor:
    """A scalar on a device. Enqueued; but the CPU, which is to read it at once, waits for it."""
    return scalar.detach().to(device, non_blocking=device.type != "cpu")


def total_everywhere(
    sums: list[Tensor], parts: list[NormPart] | None = None, found_inf: Tensor | None = None
) -> Tensor | None:
    """Replace each device's sum, a 0-dim tensor, by that of all devices. Enqueued, in a fixed order.

    Where there are `parts`, by that of all devices of all processes. Returns `found_inf`, of all processes too.
    """
    if len(sums) > 1:
        on_devices = [part.clone() for part in sums]
        for total in sums:
            on_device = [brought(part, total.device) for part in on_devices]
            total.copy_(torch.stack(on_device).sum())
    return _total_over_ranks(sums, parts, found_inf) if parts else found_inf


def _total_over_ranks(sums: list[Tensor], parts: list[NormPart], found_inf: Tensor | None) -> Tensor | None:
    """Add up squares over the processes that hold the parameters, and let all of them skip a step if one does.

    Args:
        sums: of the squares in this process, on each of its devices; 0-dim float64. All get the total.
        parts: of the parameters, the same on all processes.
        found_inf: not 0 where a gradient in this process is not finite; None if nobody has looked.

    Returns:
        `found_inf` of all processes. Work is only enqueued where the process groups' backends do so.
    """
    if not sums and found_inf is None:
        return None
    from torch.distributed import all_reduce

    with torch.no_grad():
        device = sums[0].device if sums else parts[0].device
        rest = sums[0].clone() if sums else torch.zeros((), dtype=torch.float64, device=device)
        found = torch.zeros_like(rest)
        if found_inf is not None:
            found = (brought(found_inf, device).reshape(()) != 0).to(torch.float64)
        totals: list[Tensor] = []
        for part in reversed(parts):  # what is left in the end is the first part's, the largest
            own = rest
            if sums and part is not parts[0]:
                own = _sum_of_squares(part, device)
                rest = torch.where(own.isfinite(), rest - own, rest)  # an infinity stays one
            total = torch.stack((own, found))
            for group in part.groups:
                all_reduce(total, group=group)
            totals.append(total)
        squares, founds = torch.stack(totals).sum(0)
        for device_sum in sums:
            device_sum.copy_(squares, non_blocking=True)
        return None if found_inf is None else (founds != 0).to(torch.float32)


def _sum_of_squares(part: NormPart, device: torch.device) -> Tensor:
    grads = [grad.detach() for grad in (entry.grad for entry in part.entries) if grad is not None and grad.numel()]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=device)
    norms = torch._foreach_norm(grads, 2, dtype=torch.float64)
    return torch.stack([brought(norm, device) for norm in norms]).square().sum()
