"""What an optimizer over several devices has to bring together."""

from __future__ import annotations

import torch
from torch import Tensor


def total_everywhere(sums: list[Tensor]) -> None:
    """Replace each device's sum, a 0-dim tensor, by that of all devices. Enqueued, in a fixed order."""
    if len(sums) < 2:
        return
    parts = [part.clone() for part in sums]
    for total in sums:
        on_device = [part.to(total.device, non_blocking=True) for part in parts]
        total.copy_(torch.stack(on_device).sum())
