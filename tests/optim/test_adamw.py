"""The update against float64 torch: every dtype, option and awkward size; parameters and moments."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import BLOCK, DTYPES, FEW_SHAPES, OPTIONS, SHAPES
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
    step_both,
)
from torch import Tensor

from nexus.optim import FusedAdamW

STEPS = 60
DIFFERENT_GRADS = 11  # which then come again
dtypes = pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def run(
    params: Sequence[Tensor], grad_dtype: torch.dtype | None, options: dict[str, Any], backends: tuple[str, ...]
) -> None:
    """All backends and the reference side by side. Gradients are left as they were."""
    options = {"lr": 1e-2, **options}
    reference = Float64AdamW(params, **options)
    runs = {name: FusedAdamW(copies(params), backend=name, **options) for name in backends}
    rounds = [make_grads(params, grad_dtype) for _ in range(DIFFERENT_GRADS)]
    kept = copy.deepcopy(rounds)
    for step in range(STEPS):
        grads = rounds[step % DIFFERENT_GRADS]
        reference.step(grads)
        for optimizer in runs.values():
            set_grads(optimizer.param_groups[0]["params"], grads)
            optimizer.step()
    for name, optimizer in runs.items():
        assert optimizer.backend == name
        assert_same_run(optimizer, reference, name)
        if reference.max_grad_norm is not None:
            torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=norm_rtol(name), atol=0.0)
    assert all(map(same_bits, rounds, kept))


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
    run(params, None, {"max_grad_norm": 1.0}, backends)


@pytest.mark.parametrize("amsgrad", [True, False])
def test_amsgrad_switched_while_training(backend: str, amsgrad: bool) -> None:
    optimizer, reference = run_beside_torch(make_params(FEW_SHAPES), backend, amsgrad=amsgrad)
    optimizer.param_groups[0]["amsgrad"] = reference.optimizer.param_groups[0]["amsgrad"] = not amsgrad
    for index in range(len(FEW_SHAPES)):  # torch wants it to be there
        reference.state(index).setdefault("max_exp_avg_sq", torch.zeros_like(reference.params[index]))
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


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
    if change is None:
        optimizer.register_step_pre_hook(lambda *_: optimizer.zero_grad())
    step_both(optimizer, reference, STEPS)
    with pytest.raises(AssertionError, match="parameter 0"):
        assert_same_run(optimizer, reference)


@pytest.mark.parametrize("lr", [1e-6, 1e-5])
def test_a_small_decay_is_not_lost_to_rounding(backend: str, lr: float) -> None:
    if backend == "torch":
        pytest.skip("PyTorch's kernel multiplies by 1 - lr * weight_decay")
    params = [torch.nn.Parameter(torch.rand(4096) * 1.5 + 0.5)]
    optimizer, reference = run_beside_torch(params, backend, steps=0, lr=lr, weight_decay=0.01)
    for _ in range(300):
        step_both(optimizer, reference, steps=1, grads=[torch.randn(4096)])
    bias = (params[0].double() - reference.params[0]).detach().mean()
    # 1 - 1e-8 is 1 in float32, and 1 - 1e-7 is 1 - 1.19e-7.
    assert abs(float(bias)) < 0.02 * 300 * lr * 0.01


# Values at the edge: parameters, gradients, options.
BEYOND = [-torch.inf, 1.0, torch.inf, torch.nan]
ONES = [1.0] * 4
EDGES: dict[str, tuple[list[float], list[float], dict[str, Any]]] = {
    "infinite parameters": (BEYOND, ONES, {}),
    "infinite parameters without decay": (BEYOND, ONES, {"weight_decay": 0.0}),
    "gradients that are not finite": (ONES, BEYOND, {}),
    "gradients that are not finite, amsgrad": (ONES, BEYOND, {"amsgrad": True}),
    "a norm that is infinite": (ONES, [1.0, 2.0, torch.inf, 3.0], {"max_grad_norm": 1.0}),
    "a norm that is NaN": (ONES, [1.0, 2.0, torch.nan, 3.0], {"max_grad_norm": 1.0}),
    "a norm of zero": (ONES, [0.0] * 4, {"max_grad_norm": 1.0}),
    "rate and gradient of zero": (ONES, [0.0] * 4, {"lr": 0.0}),  # pytorch#186444
    "a gradient of zero without decay": (ONES, [0.0] * 4, {"weight_decay": 0.0}),
}


@pytest.mark.parametrize(("values", "grad", "options"), EDGES.values(), ids=list(EDGES))
def test_values_at_the_edge_go_where_torchs_go(
    backend: str, values: list[float], grad: list[float], options: dict[str, Any]
) -> None:
    if backend == "torch" and options.get("amsgrad"):
        pytest.skip(
            "PyTorch's kernel may keep the largest square of before, where the next is NaN, as parameters are"
        )
    params = [*copies([torch.tensor(values)]), *make_params([(40,)])]
    optimizer, reference = run_beside_torch(params, backend, steps=0, **options)
    for _ in range(5):
        step_both(optimizer, reference, steps=1, grads=[torch.tensor(grad), torch.zeros(40)])
    assert_same_run(optimizer, reference)
    assert int(optimizer.skipped_steps) == 0  # which is for skip_nonfinite
    if not any(grad) and (options.get("lr") == 0.0 or options.get("weight_decay") == 0.0):
        assert params[0].tolist() == values
