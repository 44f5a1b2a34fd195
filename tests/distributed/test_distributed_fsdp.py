"""Over several processes: FSDP2 and other DTensors beside float64 torch in one process."""

from __future__ import annotations

import contextlib
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    OPTIONS,
    SCHEDULE,
    assert_follows,
    batch,
    follow_one_process,
    lone_group,
    loss_of,
    make_fsdp,
    make_net,
    my_rows,
    run_both,
    same_on_all_ranks,
    set_spread_grads,
    spread,
    whole,
)
from references import BACKENDS, MOMENTS, Float64AdamW, make_grads, make_params, same_bits
from side_by_side import params_of
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from worlds import in_processes

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import Cosine
from nexus.training import step_in_backward

each_backend = pytest.mark.parametrize("backend", BACKENDS)

# FSDP2.


HOW: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


@pytest.mark.parametrize(
    ("size", "backend", "steps", "how"),
    [
        *((2, backend, 4 if backend == "triton" else 30, "plain") for backend in (*BACKENDS, "triton")),
        (3, "auto", 30, "bfloat16"),
        (3, "auto", 30, "offloaded"),
    ],
)
@in_processes(device="cpu")
def test_fsdp_follows_float64_torch_on_the_same_gradients(backend: str, steps: int, how: str, device: str) -> None:
    elsewhere = how == "offloaded" and device == "cpu"  # the mesh is of another device, which "meta" stands for
    model = make_fsdp(device=device, **HOW[how])
    params, plans = list(model.parameters()), []
    reference = Float64AdamW([param.full_tensor() for param in params], amsgrad=True, **OPTIONS)
    optimizer = FusedAdamW(params, backend=backend, amsgrad=True, norm_group=lone_group(), **OPTIONS)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step, device=device))).backward()
        grads = [param.grad.full_tensor() for param in params]
        with mock.patch.object(DeviceMesh, "device_type", "meta") if elsewhere else contextlib.nullcontext():
            optimizer.step()
        reference.step(grads)
        plans.append(engine_of(optimizer).plan)
    if backend not in ("torch", "reference"):
        assert all(plan is plans[-1] for plan in plans[1:])  # once it runs, a step makes no other
    assert_follows(optimizer, reference)
    for param in params:  # offloaded moments are where their parts are
        assert {optimizer.state[param][name].to_local().device for name in MOMENTS} == {param.to_local().device}
    assert same_on_all_ranks(optimizer.grad_norm, optimizer.param_groups[0]["lr"])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(steps - 1), rel=1e-15)


@pytest.mark.parametrize("size", [2, 3])
# Gradients in float32 differ by their roundings, which 40 steps at a rate of up to 0.02 carry on.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
@in_processes()
def test_fsdp_trains_as_one_process_in_float64(dtype: torch.dtype, tolerance: float) -> None:
    alone, model = make_net(dtype).double(), make_fsdp(dtype)
    optimizer = FusedAdamW(model.parameters(), eps=1e-3, **OPTIONS)
    follow_one_process(model, optimizer, alone, steps=40, tolerance=tolerance, eps=1e-3)


@in_processes(2)
def test_updates_in_the_backward_pass_are_those_of_the_plain_loop() -> None:
    """The step updates the root's own parameters: while the pass runs, the model has them whole, not as shards."""
    runs = []
    for in_backward in (False, True):
        model = make_fsdp()
        optimizer = FusedAdamW(model.parameters(), lr=SCHEDULE)
        if in_backward:
            step_in_backward(model, optimizer)
        for step in range(10):
            loss_of(model, *map(my_rows, batch(step))).backward()
            assert in_backward == all(param.grad is None for param in (*model.first.parameters(), model.second.bias))
            optimizer.step()
            optimizer.zero_grad()
        runs.append([whole(param) for param in model.parameters()])
    assert same_bits(*runs)


# DTensors of any placement.

SHAPES = [(7, 3), (2, 5), (1,), (0, 3), (4,), (3, 2, 2)]
PLACED: dict[str, list[list[Placement]]] = {
    "all sharded": [[Shard(0)]] * 6,
    "columns and rows": [[Shard(1)], [Shard(0)], [Replicate()], [Shard(0)], [Replicate()], [Shard(2)]],
    "replicated": [[Replicate()]] * 6,
    "some plain": [[Shard(0)], [Shard(1)], [], [], [], [Replicate()]],
}


def begin(
    placed: str, backend: str, device: str = "cpu", max_grad_norm: float | None = 0.7, **options: Any
) -> tuple[FusedAdamW, Float64AdamW]:
    """Over parameters that are spread, and over whole ones."""
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    start: list[Tensor] = [param.detach().to(device) for param in make_params(SHAPES)]
    params = [
        spread(tensor, mesh, placements) if placements else torch.nn.Parameter(tensor.clone())
        for tensor, placements in zip(start, PLACED[placed], strict=True)
    ]
    of_both = {**OPTIONS, "max_grad_norm": max_grad_norm}
    return FusedAdamW(params, backend=backend, **of_both, **options), Float64AdamW(start, **of_both)


@pytest.mark.parametrize("placed", PLACED)
@each_backend
@in_processes(3)
def test_uneven_and_empty_parts_follow_float64_torch(backend: str, placed: str) -> None:
    optimizer, reference = begin(placed, backend)
    run_both(optimizer, reference, 12)
    assert_follows(optimizer, reference)
    assert same_on_all_ranks(optimizer.grad_norm, *map(whole, params_of(optimizer)))
    parts = [part.groups for part in engine_of(optimizer).plan.norm_parts]  # what costs a sum over processes
    assert len(parts) == {"all sharded": 1, "columns and rows": 2, "replicated": 0, "some plain": 2}[placed]


@each_backend
@in_processes(2)
def test_gradients_that_are_partial_or_replicated_are_brought_to_their_places(backend: str) -> None:
    optimizer, reference = begin("columns and rows", backend)
    for placements in ([Replicate()], [Partial()], None, [Partial()]):
        run_both(optimizer, reference, 3, placements)
    assert_follows(optimizer, reference)


# All skip, or none.

BAD = 3


@pytest.mark.parametrize(
    ("placed", "sees", "clips"),
    [
        ("all sharded", "a nan", True),
        ("all sharded", "an infinity", True),
        ("all sharded", "an infinity under a scaler", False),
        ("all sharded", "an infinity under a scaler", True),
        ("some plain", "found_inf", False),
        ("some plain", "found_inf", True),
    ],
)
@each_backend
@in_processes(3, device="cpu")
def test_all_skip_what_one_process_cannot_use(backend: str, placed: str, sees: str, clips: bool, device: str) -> None:
    skips_itself = sees in ("a nan", "an infinity")
    optimizer, reference = begin(
        placed, backend, device, 0.7 if clips else None, skip_nonfinite=skips_itself, norm_group=lone_group()
    )
    params = params_of(optimizer)
    scaler = torch.amp.GradScaler(device, init_scale=4.0, growth_interval=1000, enabled="scaler" in sees)
    for step in range(7):
        grads = [grad.to(device) for grad in make_grads(reference.params, torch.float32)]
        scale = float(scaler.scale(torch.ones((), device=device)))
        set_spread_grads(params, [grad * scale for grad in grads])
        here = step == BAD and dist.get_rank() == dist.get_world_size() - 1
        if sees == "found_inf":
            optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(float(here))
        elif here:
            params[0].grad.to_local()[0, 0] = math.nan if sees == "a nan" else math.inf
        scaler.step(optimizer)
        scaler.update()
        if step != BAD:
            reference.step(grads)
        elif skips_itself:
            assert not math.isfinite(float(optimizer.grad_norm))
            assert same_on_all_ranks(optimizer.grad_norm)
    assert_follows(optimizer, reference)
    assert int(optimizer.skipped_steps) == 1
    assert not scaler.is_enabled() or scaler.get_scale() == 2.0
    assert same_on_all_ranks(optimizer.skipped_steps)


# What is watched, and what is refused.


@each_backend
@in_processes(2)
def test_memory_that_moves_is_noticed(backend: str) -> None:
    optimizer, reference = begin("all sharded", backend)
    params = params_of(optimizer)
    run_both(optimizer, reference, 3)
    stale = params[0]._local_tensor
    params[0]._local_tensor = stale.clone()  # as FSDP2 does when a model moves
    params[1]._local_tensor.data = params[1]._local_tensor.clone()
    expected, version = stale.clone(), params[0]._version
    run_both(optimizer, reference, 3)
    assert torch.equal(stale, expected)
    assert params[0]._version > version
    state = optimizer.state[params[0]]
    state["exp_avg"] = state["exp_avg"].clone()  # by hand
    state["exp_avg_sq"] = state["exp_avg_sq"].full_tensor()
    state["exp_avg_sq"] = distribute_tensor(state["exp_avg_sq"], params[0].device_mesh, [Replicate()])
    run_both(optimizer, reference, 3)
    assert_follows(optimizer, reference)


@in_processes(2)
def test_what_cannot_be_updated_is_refused_by_name() -> None:
    mesh, other = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", [0])
    local = torch.ones(2, 2)

    def part(placement: Placement, of: Tensor = local, mesh: DeviceMesh = mesh) -> torch.nn.Parameter:
        return torch.nn.Parameter(DTensor.from_local(of, mesh, [placement]))

    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is a DTensor with the placements .*Partial"):
        FusedAdamW([part(Partial())])
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="which this process does not belong"):
            FusedAdamW([part(Shard(0), mesh=other)])
    with pytest.raises(TypeError, match=r"torch\.view_as_real"):
        FusedAdamW([part(Shard(0), local.to(torch.complex64))])
    param = part(Shard(0))
    optimizer = FusedAdamW([param], lr=Cosine(peak_lr=0.1, total_steps=10))
    before = param.to_local().detach().clone()
    elsewhere = DTensor.from_local(local.clone(), DeviceMesh("cpu", [1, 0]), [Shard(0)])
    for grad, words in (
        (elsewhere, "has a gradient on"),
        (torch.ones(4, 2), "is a DTensor and has a gradient that is a"),
    ):
        param.grad = grad
        with pytest.raises(RuntimeError, match=words):
            optimizer.step()
    assert torch.equal(param.to_local(), before)
