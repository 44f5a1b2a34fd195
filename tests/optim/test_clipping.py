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
    norm_rtol,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import Cosine


def test_the_norm_of_many_groups_dtypes_and_missing_gradients(backend: str) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    limits = [0.5, None, 2.0, math.inf]
    params = [make_params([(30,)], dtype)[0] for dtype in dtypes]
    groups = [{"params": [param], "max_grad_norm": limit} for param, limit in zip(params, limits, strict=True)]
    reference, optimizer = Float64AdamW(params), FusedAdamW(groups, backend=backend)
    for step in range(8):
        grads: list[Tensor | None] = list(make_grads(params))
        grads[step % 4] = None
        set_grads(params, grads)
        optimizer.step()
        norm = torch.cat([grad.double() for grad in grads if grad is not None]).norm().item()
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=norm_rtol(backend, 1e-13))
        by = [1.0 if limit is None else min(1.0, limit / (norm + 1e-6)) for limit in limits]
        reference.step([None if grad is None else grad.double() * by[i] for i, grad in enumerate(grads)])
    assert_same_run(optimizer, reference)


def test_the_norms_tensor_is_never_replaced(backend: str) -> None:
    optimizer, reference = run_beside_torch(make_params([(5,)]), backend, max_grad_norm=1.0)
    norm, address = optimizer.grad_norm, optimizer.grad_norm.data_ptr()
    optimizer.load_state_dict(optimizer.state_dict())
    step_both(optimizer, reference)
    assert optimizer.grad_norm is norm
    assert norm.data_ptr() == address
    assert float(norm) == pytest.approx(float(reference.grad_norm), rel=norm_rtol(backend, 1e-13))


def test_clipping_switched_while_training(backend: str) -> None:
    optimizer, reference = run_beside_torch(make_params([(50,), (7,)]), backend, steps=0)
    for limit in (None, 0.5, 3.0, None, math.inf, 0.5):
        optimizer.param_groups[0]["max_grad_norm"] = reference.max_grad_norm = limit
        for _ in range(2):
            assert (optimizer.grad_norm is None) == (limit is None)
            step_both(optimizer, reference, steps=1)
    assert_same_run(optimizer, reference)


# GradScaler: unscaling and skipping are part of the update.


def train(optimizer: torch.optim.Optimizer, params: list[Tensor], data: list[Any], *between: str) -> list[float]:
    """A loop with a scaler. Returns the scales."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for batch in data:
        optimizer.zero_grad()
        loss = sum((param * x).sum() for param, x in zip(params, batch, strict=True))
        scaler.scale(loss).backward()
        if "unscale" in between:
            scaler.unscale_(optimizer)
        if "clip" in between:
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=False)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


OVERFLOWS = {0: torch.inf, 5: torch.inf, 6: torch.inf, 9: torch.nan}  # by the step
# options, and what the loop does between the backward pass and the step.
LOOPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, ()),
    "clipped inside": ({"max_grad_norm": 1.0}, ()),
    "unscaled": ({}, ("unscale",)),
    "unscaled, clipped inside": ({"max_grad_norm": 1.0}, ("unscale",)),
    "unscaled, clipped before": ({}, ("unscale", "clip")),
    "a schedule": ({"lr": Cosine(peak_lr=0.1, total_steps=20)}, ()),
    "skip_nonfinite": ({"skip_nonfinite": True}, ()),
}


@pytest.mark.parity(
    "GradScaler",
    "a run with a `GradScaler`, with overflows, with and without `unscale_` and clipping",
    torch="`scaler.unscale_` and `clip_grad_norm_` come before the step",
    nexus="the same scales; `max_grad_norm` clips the unscaled gradients, after `unscale_` or without it",
    why="unscaling and clipping are part of the update",
)
@pytest.mark.parametrize(("options", "between"), LOOPS.values(), ids=list(LOOPS))
def test_a_grad_scaler_works_as_with_torch(backend: str, options: dict[str, Any], between: tuple[str, ...]) -> None:
    start = make_params([(40,), (3, 5)])
    data = [make_grads(start) for _ in range(12)]
    good = [batch for step, batch in enumerate(data) if step not in OVERFLOWS]
    for step, value in OVERFLOWS.items():
        data[step][1][2, 2] = value
    own = copies(start)
    optimizer = FusedAdamW(own, **{"lr": 1e-2, **options}, backend=backend)
    scales = train(optimizer, own, data, *between)

    limit = 1.0 if "clip" in between else options.get("max_grad_norm")
    reference = Float64AdamW(start, lr=options.get("lr", 1e-2), max_grad_norm=limit)
    for batch in good:
        reference.step(batch)
    assert int(optimizer.skipped_steps) == len(OVERFLOWS)
    assert_same_run(optimizer, reference)
    if "max_grad_norm" in options:
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-6, atol=0.0)
    if "lr" in options:  # which no skipped step advances
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(options["lr"](len(good) - 1), rel=1e-15)

    plain_params = copies(start)
    plain = torch.optim.AdamW(plain_params, lr=1e-2, fused=True)
    assert scales == train(plain, plain_params, data, "unscale", *(["clip"] if limit else []))
    assert "grad_scale" not in vars(optimizer)  # the scaler takes it away again


@pytest.mark.parametrize("shape", [(), (1,)])  # pytorch#140514
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_and_grad_scale_of_any_shape(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (own,) = make_params([(40,)])
    optimizer, reference = run_beside_torch([own], backend, steps=0)
    for step in range(6):
        (grad,) = make_grads([own])
        optimizer.grad_scale = torch.full(shape, 4.0, dtype=dtype)
        optimizer.found_inf = torch.full(shape, float(step % 3 == 1), dtype=dtype)
        own.grad = grad * 4
        before = snapshot(optimizer)
        optimizer.step()
        if step % 3 == 1:
            assert same_bits(before, snapshot(optimizer))
        else:
            reference.step([grad])
    assert int(optimizer.skipped_steps) == 2
    assert_same_run(optimizer, reference)
    del optimizer.grad_scale, optimizer.found_inf
    step_both(optimizer, reference, steps=1)
    assert_same_run(optimizer, reference)
