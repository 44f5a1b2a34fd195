"""What an optimizer over several devices, or over several processes, has to bring together."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus.backends import shards
from nexus.backends.interface import NormPart


def total_everywhere(
    sums: list[Tensor], parts: list[NormPart] | None = None, found_inf: Tensor | None = None
) -> Tensor | None:
    """Replace each device's sum, a 0-dim tensor, by that of all devices. Enqueued, in a fixed order.

    Where there are `parts`, by that of all devices of all processes. Returns `found_inf`, of all processes too.
    """
    if len(sums) > 1:
        on_devices = [part.clone() for part in sums]
        for total in sums:
            on_device = [part.to(total.device, non_blocking=True) for part in on_devices]
            total.copy_(torch.stack(on_device).sum())
    return shards.total_over_ranks(sums, parts, found_inf) if parts else found_inf
