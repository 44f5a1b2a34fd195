"""What the inspection sees of a step on another device than the CPU: on the meta device, which runs nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus.training.capture.inspection import Inspector


def refusal(function: Callable[[], Any]) -> str | None:
    inspector = Inspector(torch.device("meta"), [])
    with inspector:
        function()
    return inspector.refusal


ON_DEVICE = torch.ones(3, device="meta")
ON_CPU, FACTOR = torch.ones(3), torch.tensor(0.9)


@torch.library.custom_op("nexus_tests::seed_of", mutates_args=())
def seed_of(x: Tensor) -> Tensor:
    """As efficient attention gives its seed and offset: 0-dim, on the host, from what is on the device."""
    return torch.ones(())


@seed_of.register_fake
def _(x: Tensor) -> Tensor:
    return torch.ones((), device="cpu")


@pytest.mark.parametrize(
    "function",
    [
        lambda: ON_DEVICE * ON_CPU.to("meta"),
        lambda: ON_DEVICE.copy_(ON_CPU),
        lambda: ON_DEVICE.copy_(torch.tensor(2.0)),
        lambda: ON_DEVICE * torch.tensor(2.0).to("meta"),
        lambda: torch.empty_like(ON_DEVICE.sum(), device="cpu"),  # as loss.cpu() makes one
        lambda: ON_DEVICE * FACTOR,
        lambda: torch.zeros(3) + 1,
        lambda: torch.randn(3),
        lambda: ON_CPU.add_(1),
    ],
)
def test_a_cpu_tensor_in_the_step(function: Callable[[], Any]) -> None:
    found = refusal(function)
    assert found is not None
    assert re.search(r"aten\.\S+ \(.*test_capture_inspection\.py:\d+\) uses a tensor of shape \(.*\) on cpu", found)
    assert "make it there (device='meta')" in found


@pytest.mark.parametrize(
    "function",
    [
        lambda: ON_DEVICE * 2.0 + 1,
        lambda: ON_DEVICE * torch.tensor(2.0),
        lambda: ON_DEVICE.clone().fill_(3.0),
        lambda: torch.full((3,), 2.0, device="meta") * torch.arange(3, device="meta"),
        lambda: ON_DEVICE[torch.tensor(2.0).int().item() :],
        lambda: ON_DEVICE.index_select(0, torch.zeros(1, dtype=torch.int64, device="meta")),
        lambda: ON_DEVICE[torch.zeros(1, dtype=torch.int64, device="meta")],
        lambda: torch.nn.functional.dropout(ON_DEVICE, 0.5),
        lambda: ON_DEVICE * seed_of(ON_DEVICE),
    ],
)
def test_constants_may_be_made_in_the_step(function: Callable[[], Any]) -> None:
    assert refusal(function) is None


def test_a_tensor_made_of_numbers_of_the_host() -> None:
    # What torch.tensor(..., device=...) ends in. (On the meta device it does nothing.)
    found = refusal(lambda: ON_DEVICE + torch.ops.aten.lift_fresh(ON_DEVICE))
    assert found is not None
    assert "makes a tensor on the device from numbers of the host" in found
    assert "torch.full" in found
