"""Where the Triton backend is tested."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from references import tensors_where_it_runs

from nexus.backends import triton

if triton.INTERPRETS and triton.unavailable() is None:
    import triton_interpreter  # noqa: F401  # mends it

CPU = pytest.param("cpu", marks=pytest.mark.skipif(not triton.INTERPRETS, reason="Triton runs on the GPU"))
GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(triton.INTERPRETS, reason="Triton runs on the CPU")]
)


@pytest.fixture(params=[CPU, GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """On the CPU by Triton's interpreter, and on a GPU where there is one. Tensors are made there."""
    with tensors_where_it_runs("gpu" if request.param == "cuda" else "cpu"):
        yield request.param
