"""Where tensors lie in memory changes no bit: of an update, and, as conftest.py sees to, of a matrix product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from references import make_grads, make_params, same_bits, snapshot
from torch import Tensor

from nexus.optim import FusedAdamW

OFFSETS = (0, 1, 2, 3, 8, 13)  # in elements, from where torch has aligned a tensor


def at(offset: int, tensor: Tensor) -> Tensor:
    """A copy that begins `offset` elements into memory of its own."""
    memory = tensor.new_empty(offset + tensor.numel())
    return memory[offset:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_alignment_changes_no_bit_of_an_update(backend: str, dtype: torch.dtype) -> None:
    params = make_params([(7,), (5, 67), (1031,)], dtype)
    rounds = [make_grads(params) for _ in range(3)]
    found = []
    for offset in OFFSETS:
        own = [at(offset, param.detach()).requires_grad_() for param in params]
        optimizer = FusedAdamW(own, weight_decay=0.1, max_grad_norm=0.5, backend=backend)
        for grads in rounds:
            for param, grad in zip(own, grads, strict=True):
                param.grad = at(offset, grad)
            optimizer.step()
        found.append([*snapshot(optimizer), optimizer.grad_norm])
    assert all(same_bits(found[0], other) for other in found)


def products(offset: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """What training is made of: a layer on a batch, its gradients, and a row by itself."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((3, 7, 5), (17, 33, 9), (64, 128, 64)):
        sizes = (rows, inner), (columns, inner), (rows, columns)
        x, weight, grad = (at(offset, torch.randn(size, generator=generator, dtype=dtype)) for size in sizes)
        yield from (x @ weight.T, grad @ weight, grad.T @ x, weight @ x[0])


def test_alignment_changes_no_bit_of_a_matrix_product() -> None:
    """Where this fails, so may every test that compares two runs of a model; see conftest.py."""
    for dtype in (torch.float32, torch.float64):
        expected = list(products(0, dtype))
        assert all(same_bits(list(products(offset, dtype)), expected) for offset in OFFSETS)
