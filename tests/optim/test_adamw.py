"""The update against float64 torch: every dtype, option and awkward size; parameters and moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BLOCK, DTYPES, FEW_SHAPES, OPTIONS, SHAPES
from references import (
    PARAMS,
    Float64AdamW,
    assert_close,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    set_grads,
)
from torch import Tensor

from nexus.optim import FusedAdamW

STEPS = 60
DIFFERENT_GRADS = 11  # which then come again
dtypes = pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run(params: list[Tensor], grad_dtype: torch.dtype, options: dict[str, Any], backends: tuple[str, ...]) -> None:
    """All backends and the reference side by side."""
    options = {"lr": 1e-2, **options}
    reference = Float64AdamW(params, **options)
    runs = {name: FusedAdamW(copies(params), backend=name, **options) for name in backends}
    rounds = [make_grads(params, grad_dtype) for _ in range(DIFFERENT_GRADS)]
    for step in range(STEPS):
        grads = rounds[step % DIFFERENT_GRADS]
        reference.step(grads)
        for optimizer in runs.values():
            set_grads(optimizer.param_groups[0]["params"], grads)
            optimizer.step()
    for name, optimizer in runs.items():
        assert optimizer.backend == name
        assert_same_run(optimizer, reference, name)
        if optimizer.grad_norm is not None:
            torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-12, atol=0.0)


@dtypes
def test_every_size_equals_torch(dtype: torch.dtype, grad_dtype: torch.dtype, backends: tuple[str, ...]) -> None:
    run(make_params(SHAPES, dtype), grad_dtype, {}, backends)


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_equals_torch(
    dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, Any], backends: tuple[str, ...]
) -> None:
    run(make_params(FEW_SHAPES, dtype), grad_dtype, options, backends)


def test_every_dtype_in_one_optimizer_equals_torch(backends: tuple[str, ...]) -> None:
    params = [param for dtype, _ in DTYPES[:4] for param in make_params([(33,), (), (BLOCK + 3,)], dtype)]
    reference = Float64AdamW(params, lr=1e-2, max_grad_norm=1.0)
    runs = [FusedAdamW(copies(params), lr=1e-2, max_grad_norm=1.0, backend=name) for name in backends]
    for _ in range(STEPS):
        grads = make_grads(params)
        reference.step(grads)
        for optimizer in runs:
            set_grads(optimizer.param_groups[0]["params"], [grad.clone() for grad in grads])
            optimizer.step()
    for optimizer in runs:
        assert_same_run(optimizer, reference, optimizer.backend)


@pytest.mark.parametrize("grad_dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_any_other_dtype_equal_torch(
    dtype: torch.dtype, grad_dtype: torch.dtype, backends: tuple[str, ...]
) -> None:
    run(make_params(FEW_SHAPES, dtype), grad_dtype, {}, backends)


BROKEN: dict[str, dict[str, Any] | None] = {
    "do nothing": None,
    "no decay": {"weight_decay": 0.0},
    "decay a tenth off": {"weight_decay": 0.11},
    "beta1": {"betas": (0.901, 0.999)},
    "beta2": {"betas": (0.9, 0.9991)},
    "eps": {"eps": 1.1e-3},
    "rate": {"lr": 1.001e-2},
    "sign": {"maximize": True},
    "amsgrad": {"amsgrad": True},
    "clip": {"max_grad_norm": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", BROKEN.values(), ids=list(BROKEN))
def test_the_comparison_notices(change: dict[str, Any] | None, dtype: torch.dtype) -> None:
    params = make_params([(BLOCK + 1,)], dtype)
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1}
    reference = Float64AdamW(params, **options)
    optimizer = FusedAdamW(copies(params), **{**options, **(change or {})})
    for _ in range(STEPS):
        grads = make_grads(params)
        set_grads(optimizer.param_groups[0]["params"], grads)
        reference.step(grads)
        if change is not None:
            optimizer.step()
    with pytest.raises(AssertionError, match="parameter 0"):
        assert_same_run(optimizer, reference)


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_a_small_decay_is_not_lost_to_rounding(backend: str, lr: float) -> None:
    params = [torch.nn.Parameter(torch.rand(4096) * 1.5 + 0.5)]
    options = {"lr": lr, "weight_decay": 0.01}
    reference, optimizer = Float64AdamW(params, **options), FusedAdamW(copies(params), backend=backend, **options)
    for _ in range(300):
        grads = [torch.randn(4096)]
        set_grads(optimizer.param_groups[0]["params"], grads)
        reference.step(grads)
        optimizer.step()
    bias = (optimizer.param_groups[0]["params"][0].double() - reference.params[0]).detach().mean()
    # 1 - 1e-8 is 1 in float32, and 1 - 1e-7 is 1 - 1.19e-7.
    assert abs(float(bias)) < 0.02 * 300 * lr * 0.01


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_infinite_parameter_stays_infinite(backend: str, weight_decay: float) -> None:
    params = [torch.nn.Parameter(torch.tensor([-torch.inf, 1.0, torch.inf, torch.nan]))]
    optimizer = FusedAdamW(params, weight_decay=weight_decay, backend=backend)
    reference = Float64AdamW(params, weight_decay=weight_decay)
    for _ in range(3):
        grads = [torch.ones(4)]
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


def test_lr_zero_with_a_zero_second_moment_gives_no_nan(backend: str) -> None:  # pytorch#186444
    params = make_params([(5,)])
    before = params[0].detach().clone()
    optimizer = FusedAdamW(params, lr=0.0, eps=1e-8, backend=backend)
    for _ in range(3):
        set_grads(params, [torch.zeros(5)])
        optimizer.step()
    assert torch.equal(params[0], before)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_nan_and_infinity_reach_the_parameters_as_in_torch(backend: str, amsgrad: bool) -> None:
    params = make_params([(40,)])
    reference = Float64AdamW(params, amsgrad=amsgrad)
    optimizer = FusedAdamW(copies(params), amsgrad=amsgrad, backend=backend)
    for _ in range(5):
        grads = make_grads(params)
        grads[0][3], grads[0][17], grads[0][39] = torch.nan, torch.inf, -torch.inf
        set_grads(optimizer.param_groups[0]["params"], grads)
        reference.step(grads)
        optimizer.step()
    (param,) = optimizer.param_groups[0]["params"]
    assert int(param.isnan().sum()) == 3
    state = optimizer.state[param]
    for name, expected in reference.state(0).items():
        if name != "step":
            assert_close(state[name], expected, PARAMS[torch.float32], name)
    assert_close(param, reference.params[0], PARAMS[torch.float32], "parameter")
