"""What low-memory state is tested over: how parameters and moments are stored, and values that are hard to store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu import NAME
from low_memory_oracle import SCALE_BLOCK, Array, Mode
from torch import Tensor

from nexus import _native
from nexus.backends import triton
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of

TRITON = triton.INTERPRETS and triton.unavailable() is None
if TRITON:
    import triton_interpreter  # noqa: F401  # mends it

_8_BITS: dict[str, Any] = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
_BF16: dict[str, Any] = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
MODES = {
    "float32": Mode(),
    "float32, bf16 moments": Mode(**_BF16),
    "float32, 8-bit moments": Mode(**_8_BITS),
    "float32, 8-bit moments by chance": Mode(**_8_BITS, stochastic_rounding=True),
    "float32, bf16 and uint8": Mode(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.uint8),
    "float16, 8-bit moments": Mode(torch.float16, **_8_BITS),
    "bf16": Mode(torch.bfloat16),
    "bf16 by chance": Mode(torch.bfloat16, stochastic_rounding=True),
    "bf16 + 16, float32 moments": Mode(torch.bfloat16, 32),
    "bf16 + 16, bf16 moments": Mode(torch.bfloat16, 32, **_BF16),
    "bf16 + 16, 8-bit moments by chance": Mode(torch.bfloat16, 32, **_8_BITS, stochastic_rounding=True),
    "bf16 + 8, bf16 moments by chance": Mode(torch.bfloat16, 24, **_BF16, stochastic_rounding=True),
    "bf16 + 8, 8-bit moments": Mode(torch.bfloat16, 24, **_8_BITS),
    "bf16 + 8, 8-bit moments by chance": Mode(torch.bfloat16, 24, **_8_BITS, stochastic_rounding=True),
    "bf16, 8-bit moments by chance": Mode(torch.bfloat16, None, **_8_BITS, stochastic_rounding=True),
}
"""What is tested of how the state may be stored: the pairs of moments, and of a parameter and its master weight."""


_TRAINED: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {"master_weight_bits": 24, **_8_BITS}),
    (torch.bfloat16, {"stochastic_rounding": True, **_8_BITS}),
    (torch.float32, _BF16),
]
IN_TRAINERS = [pytest.param(*case, id=f"{case[0]} {' '.join(case[1])}") for case in _TRAINED]
"""What is trained in trainers: a model's dtype, float32 under mixed precision, and the options of its optimizer."""


def stored_dtypes(options: dict[str, Any]) -> set[torch.dtype]:
    """Of the state that such options ask for."""
    return {each for each in options.values() if isinstance(each, torch.dtype)}


WAYS = [
    *(f"native, {name}" for name in _native.instruction_sets()),
    "reference",
    NAME,  # whose kernels run on the CPU, too
    pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="Triton is not there, or runs on the GPU")),
]
"""To run an update: a backend, and of the native one an instruction set."""


def optimizer_of(
    way: str, params: Sequence[Tensor] | Sequence[dict[str, Any]], mode: Mode, **options: Any
) -> FusedAdamW:
    backend, _, instruction_set = way.partition(", ")
    optimizer = FusedAdamW(params, backend=backend, **mode.options(), **options)
    if instruction_set:
        engine_of(optimizer).prepare(vars(optimizer)).records.use_instruction_set(instruction_set)
    return optimizer


def around_thresholds(power: int, most: int, u: Array) -> Array:
    """Values whose codes are nearly the next, in whole blocks: `u` has an element for each.

    Each block has its largest at its beginning, from 1e-25 to 1e25. The others are 3 units in the last place or fewer
    from the middle between two codes, or where chance draws the line instead.
    """
    rng = np.random.default_rng(0)
    code = rng.integers(1, most + 1, len(u))
    share = (((code - u) / most) ** power).astype(np.float32)
    share = (share.view(np.int32) + rng.integers(-3, 4, len(u), dtype=np.int32)).view(np.float32)
    largest = (10.0 ** rng.uniform(-25, 25, len(u) // SCALE_BLOCK)).astype(np.float32)
    share[::SCALE_BLOCK] = 1.0
    return share * np.repeat(largest, SCALE_BLOCK)


def values(case: str, numel: int = 10_007) -> Array:
    """float32 of either sign."""
    rng = np.random.default_rng(1)
    plain = rng.standard_normal(numel).astype(np.float32)
    special = np.array([0.0, -0.0, 1e-45, -1e-40, 2.0**-126, 3.4e38, 6e4, -1e-30], dtype=np.float32)
    if case == "wide":
        return plain * np.exp(rng.uniform(-80, 80, numel)).astype(np.float32)
    if case == "sparse":
        return plain * (rng.random(numel) < 0.01)
    if case == "tiny":
        return plain * np.float32(1e-38)
    if case == "specials":
        few = rng.random(numel) < 0.01
        few[numel // 2 : numel // 2 + 200] = True  # and a whole block
        plain[few] = rng.choice(special, few.sum())
    if case == "not finite":
        few = rng.random(numel) < 0.001
        plain[few] = rng.choice(np.array([np.inf, -np.inf, np.nan], dtype=np.float32), few.sum())
    return plain


VALUES = ("numbers", "wide", "sparse", "tiny", "specials", "not finite")
