"""Updates in the backward pass of a model that is sharded over processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from references import same_bits
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from worlds import Worlds

from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training import step_in_backward

pytestmark = [pytest.mark.xdist_group("distributed")]


def trained(in_backward: bool) -> list[Tensor]:
    """The parameters after ten steps, each process with batches of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = FusedAdamW(model.parameters(), lr=WSD(2, 5, 5, 1e-2))
    if in_backward:
        step_in_backward(model, optimizer)
    for step in range(10):
        torch.manual_seed(10 * step + dist.get_rank())
        model(torch.randn(4, 5)).square().sum().backward()
        assert in_backward == all(param.grad is None for param in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return [param.full_tensor() for param in model.parameters()]  # type: ignore[attr-defined]


def equal() -> bool:
    return same_bits(trained(False), trained(True))


def test_fsdp_equals_the_plain_loop(worlds: Worlds) -> None:
    assert worlds(2).run(equal) == [True, True]
