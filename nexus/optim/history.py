"""What the last steps did, kept on the device: rates, gradient norms, clipping, skipped steps."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.arguments import check_count
from nexus.backends.interface import HISTORY_COLUMNS, DevicePlan, Ring

MAX_CAPACITY = 2**31


class HistoryRows(NamedTuple):
    """Rows of a `History`, oldest first; tensors are on the CPU.

    Attributes:
        step: int64 (rows,): completed updates before the step, which the schedules were evaluated at. That of a
            skipped step comes again in the next row.
        skipped: bool (rows,): the step changed nothing, since its gradients were not finite.
        grad_norm: float64 (rows,): the global 2-norm before clipping; NaN where it was not measured.
        lr: float64 (rows, groups): the rate of each group; in a skipped step the one that it would have used. NaN
            before the group was added.
        clip: float64 (rows, groups): what the gradients were multiplied by to keep to `max_grad_norm`; 1 where they
            were not clipped. NaN before the group was added.
        overwritten: how many rows since the last read are lost, since newer ones took their places.
    """

    step: Tensor
    skipped: Tensor
    grad_norm: Tensor
    lr: Tensor
    clip: Tensor
    overwritten: int


class History:
    """The last `capacity` steps of a `FusedAdamW`; made by its method `history`."""

    def __init__(self, capacity: int, device: torch.device, groups: int) -> None:
        self._capacity = check_count("capacity", capacity, low=1, high=MAX_CAPACITY)
        self._ring = _empty(self._capacity + 1, device, groups)
        self._left: list[Tensor] = []  # blocks that graphs may still write to
        self._rows_read = 0

    @property
    def capacity(self) -> int:
        """How many rows are kept."""
        return self._capacity

    @property
    def block(self) -> Tensor:
        """The memory that steps write to."""
        return self._ring.block

    def attach(self, plan: DevicePlan) -> None:
        """Let the steps of a plan leave rows; those that are there come along. Reads nothing back."""
        last, device, groups = self._ring, plan.state.device, len(plan.groups)
        if last.block.device != device or last.groups != groups:
            self._ring = _empty(last.slots, device, groups)
            self._ring.count.copy_(last.count)
            width = min(last.width, self._ring.width)
            self._ring.rows[:, :width].copy_(last.rows[:, :width])
            self._left.append(last.block)
        plan.history = self._ring

    def read(self) -> HistoryRows:
        """The rows since the last read, oldest first. Waits for the device, and copies from it once."""
        ring = Ring(self._ring.block.cpu(), self._ring.slots, self._ring.groups)
        written = int(ring.count)
        first = max(self._rows_read, written - self._capacity)
        overwritten = first - self._rows_read
        self._rows_read = written
        rows = ring.rows[torch.arange(first, written, device="cpu") % ring.slots]
        of_step, of_groups = rows[:, :HISTORY_COLUMNS], rows[:, HISTORY_COLUMNS:]
        return HistoryRows(
            step=of_step[:, 0].to(torch.int64),
            skipped=of_step[:, 1] != 0,
            grad_norm=of_step[:, 2],
            lr=of_groups[:, 0::2],
            clip=of_groups[:, 1::2],
            overwritten=overwritten,
        )


def _empty(slots: int, device: torch.device, groups: int) -> Ring:
    size = 1 + slots * (HISTORY_COLUMNS + 2 * groups)
    ring = Ring(torch.full((size,), math.nan, dtype=torch.float64, device=device), slots, groups)
    ring.count.zero_()
    return ring
