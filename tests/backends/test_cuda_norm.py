"""The gradient norm of a CUDA step, whose threads add squares in two floats."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_on_cpu import NAME
from torch import Tensor

from nexus.optim import FusedAdamW

BOUND = 2.0**-36  # a thread adds 64 squares of a chunk: 64**2 * 2**-48, and half of that is left of a root
GENERATOR = torch.Generator().manual_seed(3)


def normal(scale: float) -> Tensor:
    return torch.randn(40_001, generator=GENERATOR) * scale


def sparse(scale: float) -> Tensor:
    return torch.where(torch.rand(40_001, generator=GENERATOR) < 0.001, normal(scale), 0.0)


GRADIENTS = {
    "normal": normal(1.0),
    "one sign": normal(1.0).abs() + 1,
    "zeros": torch.zeros(40_001),
    "sparse": sparse(1.0),
    "sparse and tiny": sparse(1e-30),
    "squares too small for a float": normal(1e-25),
    "squares too large for a float": normal(1e25),
    "subnormal": normal(1e-40),
    "of all sizes": torch.logspace(-38, 38, 40_001)[torch.randperm(40_001, generator=GENERATOR)],
    "one large": torch.cat([normal(1e-12), torch.tensor([1e4])]),
}


def norm_of(grad: Tensor) -> float:
    param = torch.nn.Parameter(torch.zeros_like(grad))
    param.grad = grad
    optimizer = FusedAdamW([param], max_grad_norm=math.inf, backend=NAME)
    optimizer.step()
    return float(optimizer.grad_norm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_the_norm_is_exact_but_for_its_bound(name: str, dtype: torch.dtype) -> None:
    grad = GRADIENTS[name].to(dtype)
    exact = math.sqrt(math.fsum(x * x for x in grad.double().tolist()))
    assert norm_of(grad) == pytest.approx(exact, rel=BOUND, abs=0.0)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(value: float) -> None:
    grad = normal(1.0)
    grad[12_345] = value
    assert norm_of(grad) == pytest.approx(abs(value), nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_do_not_depend_on_alignment(dtype: torch.dtype) -> None:
    grad = normal(1.0).to(dtype)
    shifted = torch.empty(len(grad) + 1, dtype=dtype)[1:].copy_(grad)
    assert norm_of(shifted) == norm_of(grad)
