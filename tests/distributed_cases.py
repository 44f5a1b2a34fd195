"""What the tests of distributed training train: one model, its batches, and how many processes share them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from references import MOMENT, MOMENTS, PARAMS, Float64AdamW, assert_close, make_grads, same_bits
from side_by_side import params_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SCHEDULE = WSD(warmup_steps=5, stable_steps=10, decay_steps=15, peak_lr=2e-2, min_lr=1e-4)
OPTIONS: dict[str, Any] = {"lr": SCHEDULE, "weight_decay": 0.1, "max_grad_norm": 0.7}


def lone_group() -> dist.ProcessGroup | None:
    """In a world of one, which shards nothing: its group, so that there are sums over processes all the same."""
    return dist.group.WORLD if dist.get_world_size() == 1 else None


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_on_all_ranks(*tensors: Tensor) -> bool:
    mine = [tensor.detach().cpu() for tensor in tensors]
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


def make_net(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Net:
    """The same in every process, and every time."""
    torch.manual_seed(1)
    return Net().to(device, dtype)


def make_fsdp(dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> Net:
    model = make_net(dtype, device)
    if "mesh" not in options:
        options["mesh"] = init_device_mesh(device, (dist.get_world_size(),))
    for module in (model.first, model.second, model):
        fully_shard(module, **options)
    return model


def batch(step: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Of all processes together: twelve rows, the same whatever their number."""
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(step)).to(device, dtype)
    return x, x.sin().sum(1, keepdim=True)


def my_rows(tensor: Tensor) -> Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def loss_of(model: torch.nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def train(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    start: int,
    stop: int,
    rows: Callable[[Tensor], Tensor] = my_rows,
) -> None:
    """Each step on the rows of its batch that are this process's."""
    param = next(model.parameters())
    for step in range(start, stop):
        optimizer.zero_grad()
        loss_of(model, *map(rows, batch(step, param.dtype, param.device.type))).backward()
        optimizer.step()


def train_alone(alone: torch.nn.Module, steps: int, **options: Any) -> Float64AdamW:
    """Train in float64 torch, in one process and on whole batches; the parameters are those of the reference."""
    reference = Float64AdamW(list(alone.parameters()), **options)
    device = reference.params[0].device.type
    for step in range(steps):
        alone.zero_grad()
        loss_of(alone, *batch(step, torch.float64, device)).backward()
        reference.step([param.grad for param in alone.parameters()])
        with torch.no_grad():
            for param, value in zip(alone.parameters(), reference.params, strict=True):
                param.copy_(value)
    return reference


def follow_one_process(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    alone: torch.nn.Module,
    rows: Callable[[Tensor], Tensor] = my_rows,
    steps: int = 10,
    tolerance: float = 1e-10,
    **options: Any,
) -> None:
    """Train `model` on its rows of each batch, and `alone`, in float64, on all of them; compare the two."""
    train(model, optimizer, 0, steps, rows)
    reference = train_alone(alone, steps, **OPTIONS, **options)
    close = functools.partial(torch.testing.assert_close, rtol=tolerance)
    for (name, param), expected in zip(model.named_parameters(), reference.params, strict=True):
        close(whole(param.detach()).double(), expected.detach(), atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    close(getattr(optimizer, "optim", optimizer).grad_norm, reference.grad_norm, atol=0.0)


def assert_follows(optimizer: FusedAdamW, reference: Float64AdamW) -> None:
    """Compare every parameter, moment and counter, gathered; each process compares all of them."""
    for index, (param, expected) in enumerate(zip(params_of(optimizer), reference.params, strict=True)):
        where = f"parameter {index} {tuple(param.shape)}"
        assert_close(whole(param), expected, PARAMS[param.dtype], where)
        state, expected_state = optimizer.state[param], reference.state(index)
        assert set(state) - {"beta_products"} == set(expected_state), where
        for name in MOMENTS:
            if name in state:
                assert type(state[name]) is type(param.data), where
                assert getattr(state[name], "placements", None) == getattr(param, "placements", None), where
                assert_close(whole(state[name]), expected_state[name], MOMENT[state[name].dtype], f"{where} {name}")
        assert int(state["step"]) == int(expected_state["step"]), where
    if reference.max_grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-6, atol=0.0)


def set_spread_grads(params: list[Tensor], grads: list[Tensor], placements: list[Placement] | None = None) -> None:
    for param, grad in zip(params, grads, strict=True):
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, placements or param.placements, src_data_rank=None)
        param.grad = grad


def spread(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> torch.nn.Parameter:
    return torch.nn.Parameter(distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None))


def run_both(
    optimizer: FusedAdamW, reference: Float64AdamW, steps: int, placements: list[Placement] | None = None
) -> None:
    params = params_of(optimizer)
    for _ in range(steps):
        grads = [grad.to(params[0].device) for grad in make_grads(reference.params, torch.float32)]
        set_spread_grads(params, grads, placements)
        optimizer.step()
        reference.step(grads)
