"""Over several processes: FSDP2, tensor-parallel and other DTensors beside float64 torch in one process."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    OPTIONS,
    SCHEDULE,
    Net,
    batch,
    loss_of,
    make_fsdp,
    my_rows,
    register,
    same_on_all_ranks,
    whole,
)
from references import (
    BACKENDS,
    MOMENT,
    MOMENTS,
    PARAMS,
    Float64AdamW,
    assert_close,
    make_grads,
    make_params,
)
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from worlds import Worlds

from nexus.optim import FusedAdamW
from nexus.schedules import Cosine

pytestmark = pytest.mark.xdist_group("distributed")

ALL_BACKENDS = (*BACKENDS, "triton")


def assert_follows(optimizer: FusedAdamW, reference: Float64AdamW, what: str = "") -> None:
    """Compare every parameter, moment and counter, gathered; each process compares all of them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, (param, expected) in enumerate(zip(params, reference.params, strict=True)):
        where = f"{what} parameter {index} {tuple(param.shape)}"
        assert_close(whole(param), expected, PARAMS[param.dtype], where)
        state, expected_state = optimizer.state[param], reference.state(index)
        assert set(state) == set(expected_state), where
        for name in MOMENTS:
            if name in state:
                assert type(state[name]) is type(param.data), where
                assert getattr(state[name], "placements", None) == getattr(param, "placements", None), where
                assert_close(whole(state[name]), expected_state[name], MOMENT[state[name].dtype], f"{where} {name}")
        assert int(state["step"]) == int(expected_state["step"]), where
    if optimizer.grad_norm is not None and reference.max_grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-6, atol=0.0)


def set_spread_grads(params: list[Tensor], grads: list[Tensor], placements: list[Placement] | None = None) -> None:
    for param, grad in zip(params, grads, strict=True):
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, placements or param.placements, src_data_rank=None)
        param.grad = grad


def spread(tensor: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> torch.nn.Parameter:
    return torch.nn.Parameter(distribute_tensor(tensor.detach().clone(), mesh, placements, src_data_rank=None))


def run_both(
    params: list[Tensor],
    optimizer: FusedAdamW,
    reference: Float64AdamW,
    steps: int,
    placements: list[Placement] | None = None,
) -> None:
    for _ in range(steps):
        grads = make_grads(reference.params, torch.float32)
        set_spread_grads(params, grads, placements)
        optimizer.step()
        reference.step(grads)


# FSDP2.


def fsdp_follows_the_same_gradients(backend: str, steps: int, bf16: bool) -> None:
    register(backend)
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if bf16 else {}
    model = make_fsdp(**options)
    params = list(model.parameters())
    reference = Float64AdamW([param.full_tensor() for param in params], amsgrad=True, **OPTIONS)
    optimizer = FusedAdamW(params, backend=backend, amsgrad=True, **OPTIONS)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step))).backward()
        grads = [param.grad.full_tensor() for param in params]
        optimizer.step()
        reference.step(grads)
    assert_follows(optimizer, reference, backend)
    assert optimizer.grad_norm is not None
    assert same_on_all_ranks(optimizer.grad_norm, optimizer.param_groups[0]["lr"])
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(steps - 1), rel=1e-15)


@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_fsdp_on_two_processes_follows_float64_torch_on_the_same_gradients(worlds: Worlds, backend: str) -> None:
    worlds(2).run(fsdp_follows_the_same_gradients, backend, 4 if backend == "triton" else 30, False)


def test_fsdp_in_mixed_precision_follows_float64_torch(worlds: Worlds) -> None:
    worlds(3).run(fsdp_follows_the_same_gradients, "auto", 30, True)


def fsdp_trains_as_one_process(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    alone = Net().to(torch.float64)
    if dtype == torch.float32:
        alone.load_state_dict({name: value.double() for name, value in _float32_start().items()})
    model = make_fsdp(dtype)
    optimizer = FusedAdamW(model.parameters(), eps=1e-3, **OPTIONS)
    torchs = torch.optim.AdamW(alone.parameters(), lr=1.0, eps=1e-3, weight_decay=0.1, foreach=False)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torchs, SCHEDULE)
    for step in range(40):
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step, dtype))).backward()
        optimizer.step()
        torchs.zero_grad()
        loss_of(alone, *batch(step, torch.float64)).backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 0.7)
        torchs.step()
        scheduler.step()
    for (name, param), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        actual = param.full_tensor().double()
        torch.testing.assert_close(
            actual, expected.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def _float32_start() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return Net().state_dict()


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


def spread_params(placed: str) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters as they are here, and whole."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    start: list[Tensor] = [param.detach() for param in make_params(SHAPES)]
    params = [
        spread(tensor, mesh, placements) if placements else torch.nn.Parameter(tensor.clone())
        for tensor, placements in zip(start, PLACED[placed], strict=True)
    ]
    return params, start


def dtensors_follow(backend: str, placed: str) -> None:
    register(backend)
    params, start = spread_params(placed)
    optimizer = FusedAdamW(params, backend=backend, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    run_both(params, optimizer, reference, 12)
    assert_follows(optimizer, reference, placed)
    assert optimizer.grad_norm is not None
    assert same_on_all_ranks(optimizer.grad_norm, *map(whole, params))
    parts = [part.groups for part in optimizer._plan.norm_parts]  # what costs a sum over processes
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


def over_two_dimensions(inner: bool) -> None:
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
    run_both(params, optimizer, reference, 8)
    assert_follows(optimizer, reference)
    assert len(optimizer._plan.norm_parts) == 4
    assert same_on_all_ranks(optimizer.grad_norm)


@pytest.mark.parametrize("inner", [False, True])
def test_what_is_replicated_along_a_dimension_is_counted_once(worlds: Worlds, inner: bool) -> None:
    worlds(4).run(over_two_dimensions, inner)


def hybrid_and_tensor_parallel() -> None:
    """FSDP2 over one dimension of the mesh, tensor-parallel layers over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(1)
    alone = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    optimizer = FusedAdamW(model.parameters(), **OPTIONS)
    reference = Float64AdamW(list(alone.parameters()), **OPTIONS)
    for step in range(10):
        x, y = batch(step, torch.float64)
        rows = slice(None, None) if mesh["data"].size() == 1 else slice(mesh["data"].get_local_rank(), None, 2)
        optimizer.zero_grad()
        loss_of(model, x[rows], y[rows]).backward()
        optimizer.step()
        for param, value in zip(alone.parameters(), reference.params, strict=True):
            param.data.copy_(value.data)
            param.grad = None
        loss_of(alone, x, y).backward()
        reference.step([param.grad for param in alone.parameters()])
    assert_follows_float64(optimizer, reference)


def assert_follows_float64(optimizer: FusedAdamW, reference: Float64AdamW) -> None:
    for param, expected in zip(optimizer.param_groups[0]["params"], reference.params, strict=True):
        torch.testing.assert_close(param.full_tensor(), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-10, atol=0.0)


def test_fsdp_with_tensor_parallel_layers_trains_as_one_process(worlds: Worlds) -> None:
    worlds(4).run(hybrid_and_tensor_parallel)


def tensor_parallel(backend: str) -> None:
    register(backend)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def make() -> torch.nn.Sequential:
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 5), torch.nn.LayerNorm(5)
        )

    alone, model = make().double(), make().double()
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})  # the norm stays plain
    optimizer = FusedAdamW(model.parameters(), backend=backend, **OPTIONS)
    reference = Float64AdamW(list(alone.parameters()), **OPTIONS)
    for step in range(10):
        x, y = batch(step, torch.float64)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        alone.zero_grad()
        loss_of(alone, x, y).backward()
        reference.step([param.grad for param in alone.parameters()])
        with torch.no_grad():
            for param, value in zip(alone.parameters(), reference.params, strict=True):
                param.copy_(value)
    for param, expected in zip(model.parameters(), reference.params, strict=True):
        torch.testing.assert_close(whole(param).detach(), expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_parallel_layers_train_as_one_process(worlds: Worlds, backend: str) -> None:
    worlds(2).run(tensor_parallel, backend)


# All skip, or none.


def one_process_sees_a_nan(backend: str, value: float) -> None:
    register(backend)
    params, start = spread_params("all sharded")
    optimizer = FusedAdamW(params, backend=backend, skip_nonfinite=True, **OPTIONS)
    reference = Float64AdamW(start, **OPTIONS)
    run_both(params, optimizer, reference, 3)
    set_spread_grads(params, make_grads(start))
    if dist.get_rank() == 1:
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
        optimizer.zero_grad()
        loss_of(model, *map(my_rows, batch(step))).backward()
        optimizer.step()
        plans.append(optimizer._plan)
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
