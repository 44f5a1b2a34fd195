"""Meshes of two dimensions, tensor-parallel layers and HSDP, beside float64 torch in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    OPTIONS,
    assert_follows,
    follow_one_process,
    lone_group,
    make_fsdp,
    make_net,
    run_both,
    same_on_all_ranks,
    spread,
)
from references import BACKENDS, Float64AdamW, make_params
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of


@pytest.mark.parametrize("inner", [False, True])
@in_processes(4)
def test_what_is_replicated_along_a_dimension_is_counted_once(inner: bool) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    placed: list[list[Placement]] = [
        [Shard(0), Shard(1)],
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Replicate(), Replicate()],
    ]
    shapes = [(5, 3), (7,), (3, 2), (2,)]
    start: list[Tensor] = [param.detach() for param in make_params(shapes)]
    params: list[Tensor] = [spread(tensor, mesh, how) for tensor, how in zip(start, placed, strict=True)]
    if inner:  # on one dimension of the mesh alone
        params[1] = spread(start[1], mesh["b"], [Shard(0)])
    optimizer = FusedAdamW(params, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    run_both(optimizer, reference, 8)
    assert_follows(optimizer, reference)
    assert len(engine_of(optimizer).plan.norm_parts) == 4
    assert same_on_all_ranks(optimizer.grad_norm)


def make_layers(device: str = "cpu") -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 5), torch.nn.LayerNorm(5)
    ).to(device, torch.float64)


def make_tensor_parallel(device: str = "cpu", mesh: DeviceMesh | None = None) -> torch.nn.Module:
    """The same, of which the norm stays plain."""
    mesh = mesh or init_device_mesh(device, (dist.get_world_size(),))
    return parallelize_module(make_layers(device), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


@pytest.mark.parametrize("backend", BACKENDS)
@in_processes(2, device="cpu")
def test_tensor_parallel_layers_train_as_one_process(backend: str, device: str) -> None:
    model = make_tensor_parallel(device)
    optimizer = FusedAdamW(model.parameters(), backend=backend, norm_group=lone_group(), **OPTIONS)
    follow_one_process(model, optimizer, make_layers(device), lambda tensor: tensor)


@pytest.mark.slow
@in_processes(4)
def test_fsdp_with_tensor_parallel_layers_trains_as_one_process() -> None:
    """FSDP2 over one dimension of the mesh, tensor-parallel layers over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = make_tensor_parallel(mesh=mesh["tensor"])
    fully_shard(model, mesh=mesh["data"])
    optimizer = FusedAdamW(model.parameters(), **OPTIONS)
    follow_one_process(model, optimizer, make_layers(), lambda x: x[mesh["data"].get_local_rank() :: 2])


@pytest.mark.parametrize(("size", "replicas"), [(4, 2), (2, 2), (2, 1)])
@in_processes()
def test_hsdp_trains_as_one_process(replicas: int) -> None:
    """HSDP: FSDP2 within each replica, and copies of the parts in all of them."""
    shape = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "parts"))
    model = make_fsdp(torch.float64, mesh=mesh)
    optimizer = FusedAdamW(model.parameters(), **OPTIONS)
    follow_one_process(model, optimizer, make_net(torch.float64))
    summed = [part.groups for part in engine_of(optimizer).plan.norm_parts]
    assert summed == ([(mesh.get_group("parts"),)] if shape[1] > 1 else [])  # a copy counts once
