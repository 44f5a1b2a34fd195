"""Over several processes: FSDP2 and other DTensors beside float64 torch in one process."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    OPTIONS,
    SCHEDULE,
    Net,
    assert_follows,
    batch,
    follow_one_process,
    lone_group,
    loss_of,
    make_fsdp,
    my_rows,
    register,
    run_both,
    same_on_all_ranks,
    set_spread_grads,
    spread,
    train,
    whole,
)
from references import BACKENDS, Float64AdamW, make_grads, make_params
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from worlds import Worlds

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import Cosine

pytestmark = pytest.mark.xdist_group("distributed")

# FSDP2.


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def fsdp_follows_the_same_gradients(backend: str, steps: int, how: str = "plain", device: str = "cpu") -> None:
    register(backend)
    model = make_fsdp(device=device, **HOW[how])
    params = list(model.parameters())
    reference = Float64AdamW([param.full_tensor() for param in params], amsgrad=True, **OPTIONS)
    optimizer = FusedAdamW(params, backend=backend, amsgrad=True, norm_group=lone_group(), **OPTIONS)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step, device=device))).backward()
        grads = [param.grad.full_tensor() for param in params]
        optimizer.step()
        reference.step(grads)
    assert_follows(optimizer, reference, backend)
    assert optimizer.grad_norm is not None
    assert same_on_all_ranks(optimizer.grad_norm, optimizer.param_groups[0]["lr"])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(steps - 1), rel=1e-15)


@pytest.mark.parametrize(
    ("size", "backend", "steps", "how"),
    [
        *((2, backend, 4 if backend == "triton" else 30, "plain") for backend in (*BACKENDS, "triton")),
        (3, "auto", 30, "bfloat16"),
        (3, "auto", 30, "offloaded"),
    ],
)
def test_fsdp_follows_float64_torch_on_the_same_gradients(
    worlds: Worlds, size: int, backend: str, steps: int, how: str
) -> None:
    worlds(size).run(fsdp_follows_the_same_gradients, backend, steps, how)


def moments_stay_beside_offloaded_parts() -> None:
    """Also where the mesh is of another device, which "meta" stands for here."""
    model = make_fsdp(**HOW["offloaded"])
    optimizer = FusedAdamW(model.parameters(), **OPTIONS)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step))).backward()
        with mock.patch.object(DeviceMesh, "device_type", "meta"):
            optimizer.step()
    for param in model.parameters():
        moments = [optimizer.state[param][name] for name in ("exp_avg", "exp_avg_sq")]
        assert {tensor.device.type for moment in moments for tensor in (moment, moment.to_local())} == {"cpu"}
        assert all(moment.placements == param.placements for moment in moments)


def test_moments_are_on_the_device_of_offloaded_parts(worlds: Worlds) -> None:
    worlds(2).run(moments_stay_beside_offloaded_parts)


def fsdp_trains_as_one_process(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    alone = Net().to(dtype).double()
    model = make_fsdp(dtype)
    optimizer = FusedAdamW(model.parameters(), eps=1e-3, **OPTIONS)
    follow_one_process(model, optimizer, alone, steps=40, tolerance=tolerance, eps=1e-3)


@pytest.mark.parametrize("size", [2, 3])
# Gradients in float32 differ by their roundings, which 40 steps at a rate of up to 0.02 carry on.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
def test_fsdp_trains_as_one_process_in_float64(
    worlds: Worlds, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    worlds(size).run(fsdp_trains_as_one_process, dtype, tolerance)


# DTensors of any placement.

SHAPES = [(7, 3), (2, 5), (1,), (0, 3), (4,), (3, 2, 2)]
PLACED: dict[str, list[list[Placement]]] = {
    "all sharded": [[Shard(0)]] * 6,
    "columns and rows": [[Shard(1)], [Shard(0)], [Replicate()], [Shard(0)], [Replicate()], [Shard(2)]],
    "replicated": [[Replicate()]] * 6,
    "some plain": [[Shard(0)], [Shard(1)], [], [], [], [Replicate()]],
}


def spread_params(placed: str, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
    """The parameters as they are here, and whole."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    start: list[Tensor] = [param.detach().to(device) for param in make_params(SHAPES)]
    params = [
        spread(tensor, mesh, placements) if placements else torch.nn.Parameter(tensor.clone())
        for tensor, placements in zip(start, PLACED[placed], strict=True)
    ]
    return params, start


def dtensors_follow(backend: str, placed: str, steps: int = 12) -> None:
    register(backend)
    params, start = spread_params(placed)
    optimizer = FusedAdamW(params, backend=backend, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    run_both(params, optimizer, reference, steps)
    assert_follows(optimizer, reference, placed)
    assert optimizer.grad_norm is not None
    assert same_on_all_ranks(optimizer.grad_norm, *map(whole, params))
    parts = [part.groups for part in engine_of(optimizer).plan.norm_parts]  # what costs a sum over processes
    assert len(parts) == {"all sharded": 1, "columns and rows": 2, "replicated": 0, "some plain": 2}[placed]


@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_uneven_and_empty_parts_follow_float64_torch(worlds: Worlds, backend: str, placed: str) -> None:
    worlds(3).run(dtensors_follow, backend, placed)


def gradients_spread_otherwise(backend: str) -> None:
    register(backend)
    params, start = spread_params("columns and rows")
    optimizer = FusedAdamW(params, backend=backend, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    for placements in ([Replicate()], [Partial()], None, [Partial()]):
        run_both(params, optimizer, reference, 3, placements)
    assert_follows(optimizer, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_are_partial_or_replicated_are_brought_to_their_places(worlds: Worlds, backend: str) -> None:
    worlds(2).run(gradients_spread_otherwise, backend)


# All skip, or none.


def one_process_sees_a_nan(backend: str, value: float, device: str = "cpu") -> None:
    register(backend)
    params, start = spread_params("all sharded", device)
    optimizer = FusedAdamW(params, backend=backend, skip_nonfinite=True, norm_group=lone_group(), **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    run_both(params, optimizer, reference, 3)
    set_spread_grads(params, [grad.to(device) for grad in make_grads(start)])
    if dist.get_rank() == dist.get_world_size() - 1:
        params[0].grad.to_local()[0, 0] = value
    optimizer.step()
    assert not math.isfinite(float(optimizer.grad_norm))
    run_both(params, optimizer, reference, 3)
    assert_follows(optimizer, reference)
    assert int(optimizer.skipped_steps) == 1
    assert same_on_all_ranks(optimizer.skipped_steps, optimizer.grad_norm)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_all_skip_what_one_process_cannot_use(worlds: Worlds, backend: str, value: float) -> None:
    worlds(3).run(one_process_sees_a_nan, backend, value)


def one_process_finds_an_infinity(backend: str, how: str, clips: bool) -> None:
    register(backend)
    options = {**OPTIONS, "max_grad_norm": 0.7 if clips else None}
    params, start = spread_params("some plain" if how == "by hand" else "all sharded")
    optimizer = FusedAdamW(params, backend=backend, **options)
    reference = Float64AdamW(start, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for step in range(5):
        grads = make_grads(start)
        if how == "by hand":
            set_spread_grads(params, grads)
            optimizer.grad_scale = None
            optimizer.found_inf = torch.tensor(float(step == 2 and dist.get_rank() == 1))
            optimizer.step()
        else:
            scaler.scale(torch.zeros(()))
            set_spread_grads(params, [grad * scaler.get_scale() for grad in grads])
            if step == 2 and dist.get_rank() == 1:
                params[0].grad.to_local()[0, 0] = math.inf
            scaler.step(optimizer)
            scaler.update()
        if step != 2:
            reference.step(grads)
    assert_follows(optimizer, reference)
    assert int(optimizer.skipped_steps) == 1
    assert how == "by hand" or scaler.get_scale() == 2.0
    assert same_on_all_ranks(optimizer.skipped_steps)


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("how", ["by hand", "by a scaler"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_skip_where_one_process_overflowed(worlds: Worlds, backend: str, how: str, clips: bool) -> None:
    worlds(2).run(one_process_finds_an_infinity, backend, how, clips)


# What is watched, and what is refused.


def memory_moves(backend: str) -> None:
    register(backend)
    params, start = spread_params("all sharded")
    optimizer = FusedAdamW(params, backend=backend, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    run_both(params, optimizer, reference, 3)
    stale = params[0]._local_tensor
    params[0]._local_tensor = stale.clone()  # as FSDP2 does when a model moves
    params[1]._local_tensor.data = params[1]._local_tensor.clone()
    expected, version = stale.clone(), params[0]._version
    run_both(params, optimizer, reference, 3)
    assert torch.equal(stale, expected)
    assert params[0]._version > version
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()  # by hand
    state["exp_avg_sq"] = state["exp_avg_sq"].full_tensor()
    state["exp_avg_sq"] = distribute_tensor(state["exp_avg_sq"], params[0].device_mesh, [Replicate()])
    run_both(params, optimizer, reference, 3)
    assert_follows(optimizer, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_that_moves_is_noticed(worlds: Worlds, backend: str) -> None:
    worlds(2).run(memory_moves, backend)


def nothing_is_made_anew() -> None:
    """Once it runs, a step over DTensors makes no plan."""
    model = make_fsdp()
    optimizer = FusedAdamW(model.parameters(), **OPTIONS)
    plans = []
    for step in range(4):
        train(model, optimizer, step, step + 1)
        plans.append(engine_of(optimizer).plan)
    assert plans[1] is plans[2] is plans[3]


def test_a_plan_is_made_once(worlds: Worlds) -> None:
    worlds(2).run(nothing_is_made_anew)


def what_is_refused() -> None:
    mesh = init_device_mesh("cpu", (2,))
    local = torch.ones(2, 2)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is a DTensor with the placements .*Partial"):
        FusedAdamW([torch.nn.Parameter(DTensor.from_local(local, mesh, [Partial()]))])
    other = DeviceMesh("cpu", [0])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="which this process does not belong"):
            FusedAdamW([torch.nn.Parameter(DTensor.from_local(local, other, [Shard(0)]))])
    with pytest.raises(TypeError, match=r"torch\.view_as_real"):
        FusedAdamW([torch.nn.Parameter(DTensor.from_local(local.to(torch.complex64), mesh, [Shard(0)]))])
    param = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    optimizer = FusedAdamW([param], lr=Cosine(0.1, 10))
    before = param.to_local().detach().clone()
    param.grad = DTensor.from_local(local.clone(), DeviceMesh("cpu", [1, 0]), [Shard(0)])
    with pytest.raises(RuntimeError, match="has a gradient on"):
        optimizer.step()
    assert torch.equal(param.to_local(), before)


def test_what_cannot_be_updated_is_refused_by_name(worlds: Worlds) -> None:
    worlds(2).run(what_is_refused)
