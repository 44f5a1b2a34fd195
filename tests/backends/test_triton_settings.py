"""Groups, rates, counters, clipping and skipping in the Triton backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from clock_cases import train_by_tokens
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    params_of,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor

pytest.importorskip("triton")
from triton_cases import DTYPES, STEPS

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts

pytestmark = pytest.mark.usefixtures("where_triton_runs")


# Groups, rates and counters.


def test_groups_with_schedules_of_their_own() -> None:
    schedules = [
        WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=2e-2),
        CosineRestarts(peak_lr=1e-2, min_lr=1e-3, cycle_length=5),
        Cosine(peak_lr=1e-2, total_steps=9, warmup_steps=2),
    ]
    groups: list[dict[str, Any]] = [
        {"params": make_params([(5,)]), "lr": schedules[0], "weight_decay": Cosine(peak_lr=0.3, total_steps=8)},
        {"params": make_params([(6,)], torch.bfloat16), "lr": schedules[1], "lr_scale": 0.5, "amsgrad": True},
        {"params": make_params([(7,), ()], torch.float64), "lr": schedules[2], "betas": (0.5, 0.9)},
        {"params": make_params([(8,)]), "lr": schedules[0], "maximize": True, "eps": 1e-3},
        {"params": [], "lr": schedules[1], "lr_scale": 2.0},
    ]
    reference = Float64AdamW([dict(group) for group in groups[:-1]])
    optimizer = FusedAdamW(groups, backend="triton")
    for step in range(STEPS):
        step_both(optimizer, reference, steps=1)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        expected = [group["lr_scale"] * group["lr_schedule"](step) for group in optimizer.param_groups]
        assert torch.equal(torch.tensor(rates), torch.tensor(expected))  # in float32
        decay = optimizer.param_groups[0]
        assert float(decay["weight_decay"]) == pytest.approx(decay["weight_decay_schedule"](step), rel=1e-15)
    optimizer.param_groups.pop()
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_that_are_tensors_are_read_in_each_step(dtype: torch.dtype) -> None:
    params = make_params([(9,)])
    lr = torch.full((1,), 0.01, dtype=dtype)
    optimizer = FusedAdamW(params, lr=lr, weight_decay=lr * 10, backend="triton")
    reference = Float64AdamW(params, lr=float(lr), weight_decay=float(lr * 10))
    for rate in (0.01, 0.5, 1e-4):
        lr.fill_(rate)
        reference.optimizer.param_groups[0]["lr"] = float(lr)
        step_both(optimizer, reference, steps=2)
    assert_same_run(optimizer, reference)


def test_a_float_rate_and_every_other_setting_may_change() -> None:
    optimizer, reference = run_beside_torch(make_params([(9,), (4,)]), "triton", steps=0)
    changes: list[dict[str, Any]] = [
        {"lr": 0.1}, {"lr": 1e-5}, {"betas": (0.5, 0.7)}, {"eps": 1e-2}, {"maximize": True}, {"weight_decay": 1.0}
    ]  # fmt: skip
    for change in changes:
        optimizer.param_groups[0].update(change)
        reference.optimizer.param_groups[0].update(change)
        step_both(optimizer, reference, steps=2)
        assert_same_run(optimizer, reference, str(change))


def test_each_parameter_counts_its_own_updates() -> None:
    params = make_params([(3,), (4,), (5,)])
    optimizer, reference = run_beside_torch(params, "triton", steps=0)
    for step in range(8):
        grads: list[Tensor | None] = list(make_grads(params))
        grads[1] = grads[1] if step % 2 else None
        grads[2] = grads[2] if step >= 5 else None
        step_both(optimizer, reference, steps=1, grads=grads)
    assert [int(optimizer.state[param]["step"]) for param in params] == [8, 4, 3]
    assert_same_run(optimizer, reference)


def test_steps_without_any_gradient_advance_the_schedule() -> None:
    params, schedule = make_params([(3,)]), Cosine(peak_lr=0.1, total_steps=9)
    optimizer = FusedAdamW(params, lr=schedule, max_grad_norm=1.0, backend="triton")
    for step in range(4):
        set_grads(params, make_grads(params) if step == 2 else [None])
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(schedule(step), rel=1e-15)
        assert (float(optimizer.grad_norm) > 0.0) == (step == 2)


@pytest.mark.parametrize("start", [2**24 + 3, 2**40])
def test_counts_go_on_beyond_what_float32_holds(start: int) -> None:
    (param,) = make_params([(3,)])
    optimizer, reference = run_beside_torch([param], "triton", steps=1, betas=(0.9, 1 - 1e-9))
    optimizer.state[param]["step"].fill_(start)
    counter = reference.state(0)["step"]
    counter.data = counter.double().fill_(start)
    step_both(optimizer, reference, steps=3)
    assert_same_run(optimizer, reference)


def test_a_checkpoint_goes_on_with_another_backend() -> None:
    schedule = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=2e-2)
    optimizer, reference = run_beside_torch(make_params([(5,), (300,)]), "triton", steps=5, lr=schedule)
    for backend in ("reference", "triton"):
        saved = optimizer.state_dict()
        optimizer = FusedAdamW(copies(params_of(optimizer)), lr=schedule, backend=backend)
        optimizer.load_state_dict(saved)
        step_both(optimizer, reference, steps=3)
    optimizer.load_state_dict(optimizer.state_dict())
    step_both(optimizer, reference, steps=1)
    assert_same_run(optimizer, reference)


# The norm, clipping and skipping.


def test_every_group_clips_to_its_own_limit() -> None:
    limits = [0.5, None, 2.0, math.inf]
    params = [make_params([(30,)], dtype)[0] for dtype in DTYPES]
    groups = [{"params": [p], "max_grad_norm": limit} for p, limit in zip(params, limits, strict=True)]
    optimizer, reference = FusedAdamW(groups, lr=1e-2, backend="triton"), Float64AdamW(params, lr=1e-2)
    for step in range(5):
        grads: list[Tensor | None] = list(make_grads(params))
        grads[step % 4] = None
        set_grads(params, grads)
        optimizer.step()
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-13)
        coefficients = [1.0 if limit is None else min(1.0, limit / (norm + 1e-6)) for limit in limits]
        scaled = zip(grads, coefficients, strict=True)
        reference.step([None if grad is None else grad.double() * c for grad, c in scaled])
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_step_changes_nothing_but_its_count(value: float) -> None:
    schedule = Cosine(peak_lr=0.1, total_steps=50)
    params = [make_params([(65,)], dtype)[0] for dtype in DTYPES]
    options: dict[str, Any] = {"lr": schedule, "weight_decay": schedule, "amsgrad": True}
    optimizer = FusedAdamW(params, skip_nonfinite=True, backend="triton", **options)
    reference = Float64AdamW(params, **options)
    for step in range(9):
        if step not in (0, 3, 4):
            step_both(optimizer, reference, steps=1)
            continue
        grads = make_grads(params)
        grads[step % 4][-1] = value
        set_grads(params, grads)
        before, rate = snapshot(optimizer), float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        assert step == 0 or same_bits(before, snapshot(optimizer))
        assert rate == float(optimizer.param_groups[0]["lr"])
        assert int(optimizer.skipped_steps) == max(1, step - 1)
        assert not optimizer.grad_norm.isfinite()
    assert int(optimizer.skipped_steps) == 3
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_and_grad_scale_are_read_on_the_device(shape: tuple[int, ...], dtype: Any) -> None:
    params = make_params([(40,)])
    optimizer, reference = run_beside_torch(params, "triton", steps=0, max_grad_norm=1.0)
    for step in range(5):
        grads = make_grads(params)
        optimizer.grad_scale = torch.full(shape, 4.0, dtype=dtype)
        optimizer.found_inf = torch.full(shape, float(step % 3 == 1), dtype=dtype)
        set_grads(params, [grad * 4 for grad in grads])
        before = snapshot(optimizer)
        optimizer.step()
        if step % 3 == 1:
            assert same_bits(before, snapshot(optimizer))
        else:
            reference.step(grads)
            torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-12, atol=0.0)
    assert int(optimizer.skipped_steps) == 2
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "tensors"])
def test_rates_follow_a_clock(tensors: bool) -> None:
    train_by_tokens("triton", tensors)
