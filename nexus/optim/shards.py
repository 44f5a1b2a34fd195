"""DTensors as parameters: checks, their state, and over which processes their squares are to be added up."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus.backends.interface import NormPart, TensorEntry
from nexus.backends.shards import is_spread, local, placements

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


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
