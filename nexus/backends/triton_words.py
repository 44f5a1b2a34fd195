"""Where the fields of a record stand in the tables that the kernels of Triton read, in words."""
# mypy: ignore-errors
# Triton has no types.

from __future__ import annotations

import triton.language as tl

from nexus.backends import records
from nexus.backends.records import layout
from nexus.backends.triton_tables import CHUNK, COEFFICIENTS


def word(record: str, field: str) -> tl.constexpr:
    """Where a field stands."""
    return tl.constexpr(layout(record).offset(field) // 8)


RECORD_WORDS = tl.constexpr(layout("TensorRecord").words)
GRAD_WORD = word("TensorRecord", "grad")
STEP_WORD = word("TensorRecord", "step")
PRODUCTS_WORD = word("TensorRecord", "beta_products")
GROUP_AND_KIND_WORD = word("TensorRecord", "group")  # an int32 each, the kind as the place
CHUNK_WORDS = tl.constexpr(len(CHUNK))
COEFFICIENT_WORDS = tl.constexpr(len(COEFFICIENTS))
DTYPES = tl.constexpr(tuple(getattr(tl, str(dtype).removeprefix("torch.")) for dtype in records.DTYPES))
