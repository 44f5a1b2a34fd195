"""Groups, rates, counters, clipping and skipping in the Triton backend."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, copies, same_bits, set_grads, snapshot
from torch import Tensor

pytest.importorskip("triton")
from triton_cases import CPU, DTYPES, GPU, STEPS, grads_of, own_params, params_on, step_pair

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts


@pytest.fixture(params=[CPU, GPU])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


# Groups, rates and counters.


def test_groups_with_schedules_of_their_own(device: str) -> None:
    schedules = [WSD(3, 4, 5, 2e-2), CosineRestarts(1e-2, 1e-3, 5), Cosine(1e-2, 9, warmup_steps=2)]
    groups: list[dict[str, Any]] = [
        {"params": params_on(device, [(5,)]), "lr": schedules[0], "weight_decay": Cosine(0.3, 8)},
        {"params": params_on(device, [(6,)], torch.bfloat16), "lr": schedules[1], "lr_scale": 0.5, "amsgrad": True},
        {"params": params_on(device, [(7,), ()], torch.float64), "lr": schedules[2], "betas": (0.5, 0.9)},
        {"params": params_on(device, [(8,)]), "lr": schedules[0], "maximize": True, "eps": 1e-3},
        {"params": [], "lr": schedules[1], "lr_scale": 2.0},
    ]
    reference = Float64AdamW([dict(group) for group in groups[:-1]])
    optimizer = FusedAdamW(groups, backend="triton")
    for step in range(STEPS):
        step_pair(optimizer, reference, steps=1)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        expected = [group["lr_scale"] * group["lr_schedule"](step) for group in optimizer.param_groups]
        assert torch.equal(torch.tensor(rates), torch.tensor(expected))  # in float32
        decay = optimizer.param_groups[0]
        assert float(decay["weight_decay"]) == pytest.approx(decay["weight_decay_schedule"](step), rel=1e-15)
    optimizer.param_groups.pop()
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rates_that_are_tensors_are_read_in_each_step(device: str, dtype: torch.dtype) -> None:
    params = params_on(device, [(9,)])
    lr = torch.full((1,), 0.01, dtype=dtype, device=device)
    optimizer = FusedAdamW(copies(params), lr=lr, weight_decay=lr * 10, backend="triton")
    reference = Float64AdamW(params, lr=float(lr), weight_decay=float(lr * 10))
    for rate in (0.01, 0.5, 1e-4):
        lr.fill_(rate)
        reference.optimizer.param_groups[0]["lr"] = float(lr)
        step_pair(optimizer, reference, steps=2)
    assert_same_run(optimizer, reference)


def test_a_float_rate_and_every_other_setting_may_change(device: str) -> None:
    params = params_on(device, [(9,), (4,)])
    optimizer, reference = FusedAdamW(copies(params), backend="triton"), Float64AdamW(params)
    changes: list[dict[str, Any]] = [
        {"lr": 0.1}, {"lr": 1e-5}, {"betas": (0.5, 0.7)}, {"eps": 1e-2}, {"maximize": True}, {"weight_decay": 1.0}
    ]  # fmt: skip
    for change in changes:
        optimizer.param_groups[0].update(change)
        reference.optimizer.param_groups[0].update(change)
        step_pair(optimizer, reference, steps=2)
        assert_same_run(optimizer, reference, str(change))


def test_each_parameter_counts_its_own_updates(device: str) -> None:
    params = params_on(device, [(3,), (4,), (5,)])
    optimizer, reference = FusedAdamW(copies(params), backend="triton"), Float64AdamW(params)
    own = own_params(optimizer)
    for step in range(8):
        grads: list[Tensor | None] = list(grads_of(params))
        grads[1] = grads[1] if step % 2 else None
        grads[2] = grads[2] if step >= 5 else None
        set_grads(own, grads)
        optimizer.step()
        reference.step(grads)
    assert [int(optimizer.state[param]["step"]) for param in own] == [8, 4, 3]
    assert_same_run(optimizer, reference)


def test_steps_without_any_gradient_advance_the_schedule(device: str) -> None:
    schedule = Cosine(0.1, 9)
    params = params_on(device, [(3,)])
    optimizer = FusedAdamW(params, lr=schedule, max_grad_norm=1.0, backend="triton")
    for step in range(4):
        set_grads(params, grads_of(params) if step == 2 else [None])
        optimizer.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(schedule(step), rel=1e-15)
        assert (float(optimizer.grad_norm) > 0.0) == (step == 2)


@pytest.mark.parametrize("start", [2**24 + 3, 2**40])
def test_counts_go_on_beyond_what_float32_holds(device: str, start: int) -> None:
    params = params_on(device, [(3,)])
    options: dict[str, Any] = {"betas": (0.9, 1 - 1e-9)}
    optimizer, reference = FusedAdamW(copies(params), backend="triton", **options), Float64AdamW(params, **options)
    step_pair(optimizer, reference, steps=1)
    optimizer.state[own_params(optimizer)[0]]["step"].fill_(start)
    counter = reference.state(0)["step"]
    counter.data = counter.double().fill_(start)
    step_pair(optimizer, reference, steps=3)
    assert_same_run(optimizer, reference)


def test_a_checkpoint_goes_on_with_another_backend(device: str) -> None:
    schedule = WSD(3, 4, 5, 2e-2)
    params = params_on(device, [(5,), (300,)])
    reference = Float64AdamW(params, lr=schedule)
    first = FusedAdamW(copies(params), lr=schedule, backend="triton")
    step_pair(first, reference, steps=5)
    second = FusedAdamW(copies(own_params(first)), lr=schedule, backend="reference")
    second.load_state_dict(first.state_dict())
    step_pair(second, reference, steps=3)
    first = FusedAdamW(copies(own_params(second)), lr=schedule, backend="triton")
    first.load_state_dict(second.state_dict())
    step_pair(first, reference, steps=3)
    first.load_state_dict(first.state_dict())
    step_pair(first, reference, steps=1)
    assert_same_run(first, reference)


# The norm, clipping and skipping.


def test_every_group_clips_to_its_own_limit(device: str) -> None:
    limits = [0.5, None, 2.0, math.inf]
    params = [params_on(device, [(30,)], dtype)[0] for dtype in DTYPES]
    own = copies(params)
    groups = [{"params": [p], "max_grad_norm": limit} for p, limit in zip(own, limits, strict=True)]
    optimizer, reference = FusedAdamW(groups, lr=1e-2, backend="triton"), Float64AdamW(params, lr=1e-2)
    for step in range(5):
        grads: list[Tensor | None] = list(grads_of(params))
        grads[step % 4] = None
        set_grads(own, grads)
        optimizer.step()
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads if grad is not None))
        assert float(optimizer.grad_norm) == pytest.approx(norm, rel=1e-13)
        coefficients = [1.0 if limit is None else min(1.0, limit / (norm + 1e-6)) for limit in limits]
        scaled = zip(grads, coefficients, strict=True)
        reference.step([None if grad is None else grad.double() * c for grad, c in scaled])
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_norm_that_is_not_finite_spoils_all_as_in_torch(device: str, value: float) -> None:
    params = params_on(device, [(6,), (4,)])
    optimizer = FusedAdamW(copies(params), max_grad_norm=1.0, backend="triton")
    reference = Float64AdamW(params, max_grad_norm=1.0)
    for _ in range(2):
        grads = grads_of(params)
        grads[0][2] = value
        set_grads(own_params(optimizer), grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_skipped_step_changes_nothing_but_its_count(device: str, value: float) -> None:
    schedule = Cosine(0.1, 50)
    params = [params_on(device, [(65,)], dtype)[0] for dtype in DTYPES]
    options: dict[str, Any] = {"lr": schedule, "weight_decay": schedule, "amsgrad": True}
    optimizer = FusedAdamW(copies(params), skip_nonfinite=True, backend="triton", **options)
    reference = Float64AdamW(params, **options)
    own = own_params(optimizer)
    skipped = 0
    for step in range(9):
        grads = grads_of(params)
        if step in (0, 3, 4):
            grads[step % 4][-1] = value
            set_grads(own, grads)
            before = snapshot(optimizer), float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            skipped += 1
            assert step == 0 or same_bits(before[0], snapshot(optimizer))
            assert before[1] == float(optimizer.param_groups[0]["lr"])
            assert not optimizer.grad_norm.isfinite()
        else:
            set_grads(own, grads)
            optimizer.step()
            reference.step(grads)
        assert int(optimizer.skipped_steps) == skipped
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_found_inf_and_grad_scale_are_read_on_the_device(device: str, shape: tuple[int, ...], dtype: Any) -> None:
    params = params_on(device, [(40,)])
    optimizer, reference = (
        FusedAdamW(copies(params), max_grad_norm=1.0, backend="triton"),
        Float64AdamW(params, max_grad_norm=1.0),
    )
    own = own_params(optimizer)
    for step in range(5):
        grads = grads_of(params)
        optimizer.grad_scale = torch.full(shape, 4.0, dtype=dtype, device=device)
        optimizer.found_inf = torch.full(shape, float(step % 3 == 1), dtype=dtype, device=device)
        set_grads(own, [grad * 4 for grad in grads])
        before = snapshot(optimizer)
        optimizer.step()
        if step % 3 == 1:
            assert same_bits(before, snapshot(optimizer))
        else:
            reference.step(grads)
            torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-12, atol=0.0)
    assert int(optimizer.skipped_steps) == 2
    assert_same_run(optimizer, reference)
