"""Parameters that are spread over processes: the part that is here, and sums over the processes.

`torch.distributed` is not imported here before the first tensor of its own comes along.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import TypeIs

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from nexus.backends.interface import NormPart


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


@torch.no_grad()
def spread_as(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a DTensor once it is spread as `like` is: a collective, where it is not yet."""
    if is_spread(tensor) and is_spread(like):
        tensor = tensor.redistribute(placements=like.placements)
    return local(tensor).detach()


def total_over_ranks(sums: list[Tensor], parts: list[NormPart], found_inf: Tensor | None) -> Tensor | None:
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
            found = (found_inf.detach().to(device, non_blocking=True).reshape(()) != 0).to(torch.float64)
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
    return torch.stack([norm.to(device, non_blocking=True) for norm in norms]).square().sum()
