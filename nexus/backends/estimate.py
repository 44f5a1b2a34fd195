"""Steps of FakeTensors, which have no memory: what a step allocates and copies, for estimates, and no update.

The kernels allocate nothing. What is left are the copies of what no kernel can take where it is.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from nexus.backends import reference

NAME = "estimate"
DEVICE_TYPES = reference.DEVICE_TYPES
evaluate = reference.evaluate


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """FakeTensors may be on any device."""
    return None


def detail() -> str:
    """In words."""
    return "FakeTensors: memory is counted, and nothing is updated"


def runner(setting_names: tuple[str, ...]) -> EstimateRunner:
    """One for an optimizer."""
    return EstimateRunner()


class EstimateRunner(reference.ReferenceRunner):
    """Makes the copies of a step."""

    name = NAME

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        entries = [entry for plan in self._plan.devices.values() for entry in plan.entries]
        for entry in entries:
            entry.fetch()
        for entry in entries:
            entry.put_back()
