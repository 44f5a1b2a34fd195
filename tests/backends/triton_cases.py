"""What the tests of the Triton backend share: where they run, and runs beside the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton_interpreter  # noqa: F401  # mends it
from references import Float64AdamW, assert_same_run, copies, make_grads, make_params, set_grads
from torch import Tensor

from nexus.backends import triton as backend
from nexus.optim import FusedAdamW

STEPS = 12
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# parameter, gradient
COMMON = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not backend.INTERPRETS, reason="Triton runs on the GPU"))
GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(backend.INTERPRETS or not torch.cuda.is_available(), reason="needs a GPU"),
    ],
)


def params_on(device: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.nn.Parameter(param.detach().to(device)) for param in make_params(shapes, dtype)]


def grads_of(params: Sequence[Tensor], dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
    dtypes = dtypes or [param.dtype for param in params]
    return [make_grads([param], dtype)[0].to(param.device) for param, dtype in zip(params, dtypes, strict=True)]


def own_params(optimizer: FusedAdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def step_pair(
    optimizer: FusedAdamW,
    reference: Float64AdamW,
    steps: int = STEPS,
    grad_dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    params = own_params(optimizer)
    for _ in range(steps):
        grads = grads_of(params, grad_dtypes)
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()


def run(params: list[Tensor], grad_dtypes: Sequence[torch.dtype] | None = None, **options: Any) -> FusedAdamW:
    """Steps beside the reference, and the comparison."""
    options = {"lr": 1e-2, **options}
    reference = Float64AdamW(params, **options)
    optimizer = FusedAdamW(copies(params), backend="triton", **options)
    step_pair(optimizer, reference, grad_dtypes=grad_dtypes)
    assert optimizer.backend == "triton"
    assert_same_run(optimizer, reference)
    if optimizer.grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-12, atol=0.0)
    return optimizer
