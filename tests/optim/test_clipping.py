"""Clipping to a global norm and GradScaler's scaling, inside the update: against torch's separate passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
)
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import Cosine

NORM = {"rtol": 1e-12, "atol": 0.0}  # summed in float64; measured: 3e-16


def norm_of(grads: list[Tensor | None]) -> float:
    return math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 30.0, 1e9, math.inf])
def test_the_norm_is_that_of_all_gradients(backend: str, dtype: torch.dtype, max_norm: float) -> None:
    params = make_params([(600,), (), (0,), (3, 5)], dtype)
    optimizer = FusedAdamW(params, max_grad_norm=max_norm, backend=backend)
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, [grad.clone() for grad in grads])
        optimizer.step()
        norm = optimizer.grad_norm
        torch.testing.assert_close(norm, torch.tensor(norm_of(grads), dtype=torch.float64), **NORM)
        assert same_bits([param.grad for param in params], grads)  # which are left as they were


def test_the_norm_of_many_groups_dtypes_and_missing_gradients(backend: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    params = [make_params([(30,)], dtype)[0] for dtype in dtypes]
    options = [{"max_grad_norm": 0.5}, {"max_grad_norm": None}, {"max_grad_norm": 2.0}, {"max_grad_norm": math.inf}]
    own = copies(params)
    groups = [{"params": [param], **option} for param, option in zip(own, options, strict=True)]
    optimizer, reference = FusedAdamW(groups, lr=1e-2, backend=backend), Float64AdamW(params, lr=1e-2)
    for step in range(8):
        grads: list[Tensor | None] = list(make_grads(params))
        grads[step % 4] = None
        set_grads(own, grads)
        optimizer.step()
        norm = norm_of(grads)
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-13)
        clipped = []
        for grad, option in zip(grads, options, strict=True):
            limit = option["max_grad_norm"]
            coefficient = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
            clipped.append(None if grad is None else grad.double() * coefficient)
        reference.step(clipped)
    assert_same_run(optimizer, reference)


def test_the_norm_is_only_computed_where_someone_asks(backend: str) -> None:
    params = make_params([(5,)])
    assert FusedAdamW(params, backend=backend).grad_norm is None
    assert FusedAdamW(params, backend=backend, max_grad_norm=math.inf).grad_norm is not None
    assert FusedAdamW(params, backend=backend, skip_nonfinite=True).grad_norm is not None
    assert FusedAdamW([{"params": params, "max_grad_norm": 1.0}], backend=backend).grad_norm is not None


def test_the_norms_tensor_is_never_replaced(backend: str) -> None:
    params = make_params([(5,)])
    optimizer, _ = run_beside_torch(params, backend, max_grad_norm=1.0)
    norm, address = optimizer.grad_norm, optimizer.grad_norm.data_ptr()
    optimizer.load_state_dict(optimizer.state_dict())
    set_grads(params, [torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0])])
    optimizer.step()
    assert optimizer.grad_norm is norm
    assert norm.data_ptr() == address
    assert float(norm) == 5.0


def test_clipping_switched_while_training(backend: str) -> None:
    params = make_params([(50,), (7,)])
    own = copies(params)
    optimizer, reference = FusedAdamW(own, backend=backend), Float64AdamW(params)
    for limit in (None, 0.5, 3.0, None, math.inf, 0.5):
        optimizer.param_groups[0]["max_grad_norm"] = reference.max_grad_norm = limit
        for _ in range(2):
            grads = make_grads(params)
            set_grads(own, grads)
            optimizer.step()
            reference.step(grads)
            assert (optimizer.grad_norm is None) == (limit is None)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_spoils_all_as_in_torch(backend: str, value: float) -> None:
    params = make_params([(6,), (4,)])
    own = copies(params)
    optimizer = FusedAdamW(own, max_grad_norm=1.0, backend=backend)
    reference = Float64AdamW(params, max_grad_norm=1.0)
    for _ in range(2):
        grads = make_grads(params)
        grads[0][2] = value
        set_grads(own, grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


def test_a_zero_gradient_is_not_divided_by_its_norm(backend: str) -> None:
    params = make_params([(6,)])
    own = copies(params)
    optimizer = FusedAdamW(own, max_grad_norm=1.0, backend=backend)
    reference = Float64AdamW(params, max_grad_norm=1.0)
    for _ in range(2):
        set_grads(own, [torch.zeros(6)])
        optimizer.step()
        reference.step([torch.zeros(6)])
    assert float(optimizer.grad_norm) == 0.0
    assert_same_run(optimizer, reference)


# GradScaler: unscaling and skipping are part of the update.


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], data: list[Tensor], **options: Any) -> list[float]:
    """A loop with a scaler; a batch that holds an infinity overflows. Returns the scales."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for batch in data:
        optimizer.zero_grad()
        loss = sum((param * x).sum() for param, x in zip(params, batch, strict=True))
        scaler.scale(loss).backward()
        if options.get("unscale"):
            scaler.unscale_(optimizer)
        if options.get("clip"):
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def batches(overflow: bool) -> list[list[Tensor]]:
    data = [make_grads([torch.zeros(40), torch.zeros(3, 5)]) for _ in range(12)]
    if overflow:
        for step in (0, 5, 6):
            data[step][1][2, 2] = torch.inf
        data[9][0][3] = torch.nan
    return data


@pytest.mark.parity(
    "GradScaler",
    "a run with a `GradScaler`, with overflows, with and without `unscale_` and clipping",
    torch="`scaler.unscale_` and `clip_grad_norm_` come before the step",
    nexus="the same scales; `max_grad_norm` clips the unscaled gradients, after `unscale_` or without it",
    why="unscaling and clipping are part of the update",
)
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize(
    ("unscale", "clip"), [(False, "no"), (False, "inside"), (True, "no"), (True, "inside"), (True, "before")]
)
def test_a_grad_scaler_works_as_with_torch(backend: str, overflow: bool, unscale: bool, clip: str) -> None:
    start = make_params([(40,), (3, 5)])
    data = batches(overflow)
    own = copies(start)
    limit = 1.0 if clip == "inside" else None
    optimizer = FusedAdamW(own, lr=1e-2, max_grad_norm=limit, backend=backend)
    scales = train(optimizer, own, data, unscale=unscale, clip=clip == "before")

    reference = Float64AdamW(start, lr=1e-2, max_grad_norm=None if clip == "no" else 1.0)
    good = [batch for batch in data if all(x.isfinite().all() for x in batch)]
    for batch in good:
        reference.step(batch)
    assert len(good) == (8 if overflow else 12)
    assert int(optimizer.skipped_steps) == 12 - len(good)
    assert_same_run(optimizer, reference)
    if clip == "inside" and not unscale:
        assert float(optimizer.grad_norm) == pytest.approx(norm_of(data[-1]), rel=1e-6)

    plain_params = copies(start)
    plain = torch.optim.AdamW(plain_params, lr=1e-2, fused=True)
    expected = train(plain, plain_params, data, unscale=True, clip=clip != "no")
    assert scales == expected
    assert "grad_scale" not in vars(optimizer)  # the scaler takes it away again


def test_a_skipped_overflow_does_not_advance_the_schedule(backend: str) -> None:
    schedule = Cosine(0.1, 20)
    own = make_params([(40,), (3, 5)])
    optimizer = FusedAdamW(own, lr=schedule, backend=backend)
    train(optimizer, own, batches(overflow=True))
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(schedule(7), rel=1e-15)


@pytest.mark.parametrize("shape", [(), (1,)])  # pytorch#140514
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_and_grad_scale_of_any_shape(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    start = make_params([(40,)])
    own = copies(start)
    optimizer, reference = FusedAdamW(own, backend=backend), Float64AdamW(start)
    for step in range(6):
        grads = make_grads(start)
        optimizer.grad_scale = torch.full(shape, 4.0, dtype=dtype)
        optimizer.found_inf = torch.full(shape, float(step % 3 == 1), dtype=dtype)
        set_grads(own, [grad * 4 for grad in grads])
        before = snapshot(optimizer)
        optimizer.step()
        if step % 3 == 1:
            assert same_bits(before, snapshot(optimizer))
        else:
            reference.step(grads)
    assert int(optimizer.skipped_steps) == 2
    assert_same_run(optimizer, reference)
    del optimizer.grad_scale, optimizer.found_inf
    grads = make_grads(start)
    set_grads(own, grads)
    optimizer.step()
    reference.step(grads)
    assert_same_run(optimizer, reference)


def test_skip_nonfinite_beside_a_scaler(backend: str) -> None:
    start = make_params([(40,), (3, 5)])
    own = copies(start)
    optimizer = FusedAdamW(own, skip_nonfinite=True, backend=backend)
    train(optimizer, own, batches(overflow=True))
    assert int(optimizer.skipped_steps) == 4
    assert int(optimizer.state[own[0]]["step"]) == 8
