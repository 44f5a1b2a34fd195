"""Small runs of low-memory state, which tests save, load, change and break."""

from __future__ import annotations

import functools
from typing import Any

import torch
from references import make_grads, set_grads
from torch.nn import Parameter

from nexus.optim import FusedAdamW

BF16 = torch.bfloat16
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)
SEVEN_BYTES: dict[str, Any] = {"master_weight_bits": 24, "exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}


def parameters(dtype: torch.dtype = BF16) -> list[Parameter]:
    """One with a short last block, laid out in another order, and one that is too small for fewer bits."""
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(65, 67, generator=generator).to(dtype).t()
    return [Parameter(large), Parameter(torch.randn(7, 9, generator=generator).to(dtype))]


def trained(dtype: torch.dtype = BF16, steps: int = 5, **options: Any) -> tuple[FusedAdamW, list[Parameter]]:
    params = parameters(dtype)
    optimizer = FusedAdamW(params, lr=1e-2, **options)
    go_on(optimizer, params, steps)
    return optimizer, params


def go_on(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: int = 3) -> None:
    torch.manual_seed(steps)
    for _ in range(steps):
        set_grads(params, [grad.to(param.dtype) for grad, param in zip(make_grads(params), params, strict=True)])
        optimizer.step()


def beside(params: list[Parameter], **options: Any) -> tuple[FusedAdamW, list[Parameter]]:
    """A new optimizer of equal parameters."""
    own = [Parameter(param.detach().clone()) for param in params]
    return FusedAdamW(own, lr=1e-2, **options), own


def assert_same_state(a: FusedAdamW, b: FusedAdamW) -> None:
    for one, other in zip(a.state.values(), b.state.values(), strict=True):
        assert_same(one, other)
