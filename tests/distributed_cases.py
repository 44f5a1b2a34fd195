"""What the tests of distributed training train: one model, its batches, and how many processes share them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from references import same_bits
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from nexus.schedules import WSD

SCHEDULE = WSD(warmup_steps=5, stable_steps=10, decay_steps=15, peak_lr=2e-2, min_lr=1e-4)
OPTIONS: dict[str, Any] = {"lr": SCHEDULE, "weight_decay": 0.1, "max_grad_norm": 0.7}


def register(backend: str) -> None:
    if backend == "cuda on cpu":
        import cuda_on_cpu  # noqa: F401  # registers it


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_on_all_ranks(*tensors: Tensor) -> bool:
    mine = [tensor.clone() for tensor in tensors]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return all(same_bits(mine, other) for other in found)


class Net(torch.nn.Module):
    """With seven rows, three, and one: uneven parts, and on the last rank empty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)
        self.norm, self.last = torch.nn.LayerNorm(3), torch.nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


def make_fsdp(dtype: torch.dtype = torch.float32, **options: Any) -> Net:
    torch.manual_seed(1)
    model = Net().to(dtype)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model.first, model.second):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Of all processes together: twelve rows, the same whatever their number."""
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(dtype)
    return x, x.sin().sum(1, keepdim=True)


def my_rows(tensor: Tensor) -> Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()
