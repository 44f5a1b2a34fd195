"""What the tests of the Triton backend share: dtypes, and a run beside the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton_interpreter  # noqa: F401  # mends it
from references import assert_same_run, make_grads, run_beside_torch, step_both
from torch import Tensor

STEPS = 12
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# parameter, gradient
COMMON = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def run(params: Sequence[Tensor], grad_dtypes: Sequence[torch.dtype] | None = None, **options: Any) -> None:
    """Steps beside the reference, and the comparison."""
    optimizer, reference = run_beside_torch(params, "triton", steps=0, **options)
    dtypes = grad_dtypes or [param.dtype for param in params]
    for _ in range(STEPS):
        grads = [grad.to(dtype) for grad, dtype in zip(make_grads(params, torch.float32), dtypes, strict=True)]
        step_both(optimizer, reference, steps=1, grads=grads)
    assert optimizer.backend == "triton"
    assert_same_run(optimizer, reference)
    if optimizer.grad_norm is not None:
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-12, atol=0.0)
