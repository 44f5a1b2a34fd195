"""Tensors of every size, layout and alignment; memory that is swapped or shared; gradients that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from references import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MOMENT,
    PARAMS,
    Float64AdamW,
    assert_close,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor

from nexus.optim import FusedAdamW

# Empty tensors, empty groups, many tensors.


@pytest.mark.parametrize(
    "shapes",
    [[(5,), (0,)], [(0,), (5,)], [(0,)], [(5,), (0, 3), (7,), (3, 0), ()], [(), (0,), ()], [(5, 0), (7,)]],
    ids=str,
)
def test_empty_tensors_hide_no_others(backend: str, shapes: list[tuple[int, ...]]) -> None:
    for options in ({}, {"max_grad_norm": 1.0}):
        params = make_params(shapes)
        optimizer, reference = run_beside_torch(params, backend, **options)
        step_both(optimizer, reference, grads=[LAYOUTS["every other"](grad) for grad in make_grads(params)])
        assert_same_run(optimizer, reference)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_group_and_one_without_gradients(backend: str, empty: int) -> None:
    params = make_params([(5,), (6,), (4,)])
    groups: list[dict[str, Any]] = [{"params": [param], "lr": 0.1 / (1 + i)} for i, param in enumerate(params)]
    groups.insert(empty, {"params": []})
    optimizer, reference = run_beside_torch(groups, backend, steps=0)
    for _ in range(3):
        step_both(optimizer, reference, steps=1, grads=[*make_grads(params[:2]), None])
    assert_same_run(optimizer, reference)
    assert params[2] not in optimizer.state


def test_twenty_one_thousand_parameters() -> None:
    start = torch.randn(21_000, 2)
    params = copies(start.unbind())
    reference = Float64AdamW([start], max_grad_norm=1.0)
    optimizer = FusedAdamW(params, backend="native", max_grad_norm=1.0)
    for _ in range(3):
        grad = torch.randn_like(start)
        set_grads(params, grad.unbind())
        optimizer.step()
        reference.step([grad])
    for name in ("exp_avg", "exp_avg_sq"):
        actual = torch.stack([optimizer.state[param][name] for param in params])
        assert_close(actual, reference.state(0)[name], MOMENT[torch.float32], name)
    assert_close(torch.stack(params), reference.params[0], PARAMS[torch.float32])
    assert {int(optimizer.state[param]["step"]) for param in params} == {3}


# Layouts.


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_parameter_and_gradient(backend: str, layout: str, grad_layout: str) -> None:
    start = make_params([LAYOUT_SHAPE, (6,)])
    params = [torch.nn.Parameter(LAYOUTS[layout](start[0].detach())), start[1]]
    strides = params[0].stride()
    optimizer, reference = run_beside_torch(params, backend, steps=0, amsgrad=True, max_grad_norm=1.0)
    assert params[0].is_contiguous() == (layout in ("contiguous", "offset", "as_strided"))
    for step in range(6):
        grads = make_grads(start)
        if step == 2:  # an expanded gradient and another layout come in between
            grads[0] = grads[0][:1, :, :1].expand(LAYOUT_SHAPE)
        elif step != 3:
            grads[0] = LAYOUTS[grad_layout](grads[0])
        step_both(optimizer, reference, steps=1, grads=grads)
        assert params[0].stride() == strides
    assert_same_run(optimizer, reference)


def test_a_copied_gradient_may_change_its_dtype(backend: str) -> None:
    optimizer, reference = run_beside_torch(make_params([(3, 4)], torch.bfloat16), backend)
    for dtype in (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16):
        step_both(optimizer, reference, steps=1, grads=[torch.randn(4, 3).to(dtype).t()])
    assert_same_run(optimizer, reference)


# Where a tensor begins in memory changes no bit.

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
            set_grads(own, [at(offset, grad) for grad in grads])
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


# Storage that is swapped under a parameter: a stale pointer is never written through.


def swap_set(param: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        param.set_(new)


def swap_tensors(param: Tensor, new: Tensor) -> None:
    grad, param.grad = param.grad, None
    torch.utils.swap_tensors(param, torch.nn.Parameter(new))
    param.grad = grad


SWAPS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "data": lambda param, new: setattr(param, "data", new),
    "set_": swap_set,
    "swap_tensors": swap_tensors,
}


@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_swapped_storage_is_followed(backend: str, layout: str, swap: Callable[[Tensor, Tensor], None]) -> None:
    params = make_params([LAYOUT_SHAPE, (7,)])
    optimizer, reference = run_beside_torch(params, backend)
    for _ in range(2):  # the second time, from one such storage to the next
        old = params[0].data
        swap(params[0], LAYOUTS[layout](old.clone()))
        old.fill_(12345.0)
        address = params[0].data_ptr()
        step_both(optimizer, reference)
        assert params[0].data_ptr() == address
        assert (old == 12345.0).all()
    assert_same_run(optimizer, reference)


# Memory that parameters share.


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ([lambda x: x[:, :3], lambda x: x[:, 2:]], "parameter 1 .* shares memory with parameter 0 of group 0"),
        ([lambda x: x.as_strided((2, 2), (1, 1))], "shares memory with itself"),
    ],
    ids=["slices", "itself"],
)
def test_shared_memory_is_refused(backend: str, views: list[Callable[[Tensor], Tensor]], words: str) -> None:
    base = torch.zeros(4, 4)
    params = [torch.nn.Parameter(view(base)) for view in views]
    set_grads(params, [torch.ones_like(param) for param in params])
    optimizer = FusedAdamW(params, backend=backend)
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            optimizer.step()
    assert not base.any()


def test_memory_that_comes_to_be_shared_is_refused() -> None:
    params = make_params([(6,), (6,)])
    optimizer, _ = run_beside_torch(params, "native")
    before = copies(params)
    params[0].data = params[1].data
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0 and 1 .* share memory"):
            optimizer.step()
    assert torch.equal(params[1], before[1])
    params[0].data = before[0].data.clone()
    optimizer.step()
    assert not torch.equal(params[0], before[0])


def test_slices_side_by_side_share_no_memory(backend: str) -> None:
    base = torch.zeros(4, 5)
    params = [torch.nn.Parameter(base[:, :2]), torch.nn.Parameter(base[:, 2:])]
    assert_same_run(*run_beside_torch(params, backend))
    assert base.all()


# Gradients that no kernel can read: a clear error, and nothing changed.

UNREADABLE: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "sparse": (
        lambda param: setattr(param, "grad", param.grad.to_sparse()),
        RuntimeError,
        ".*sparse gradients.*SparseAdam",
    ),
    "freed": (lambda param: param.grad.untyped_storage().resize_(0), RuntimeError, ".*storage was freed"),
    "of another shape": (
        lambda param: setattr(param, "data", torch.zeros(4)),
        RuntimeError,
        r".*shape \(4,\).*gradient of shape \(4, 3\)",
    ),
    "of integers": (
        lambda param: set_grads([param], [torch.ones(4, 3, dtype=torch.int64)]),
        TypeError,
        "has a gradient of torch.int64, which FusedAdamW does not support",
    ),
}


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("spoil", "error", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_gradient_that_cannot_be_read_is_refused(
    backend: str, spoil: Callable[[Tensor], Any], error: type[Exception], words: str, index: int
) -> None:
    params = make_params([(4, 3), (4, 3)])
    optimizer, reference = run_beside_torch(params, backend)
    before, kept = snapshot(optimizer), params[index].data
    set_grads(params, make_grads(params))
    spoil(params[index])
    with pytest.raises(error, match=f"parameter {index} of group 0 {words}"):
        optimizer.step()
    params[index].data, params[index].grad = kept, None
    assert same_bits(before, snapshot(optimizer))
    step_both(optimizer, reference)  # it goes on
    assert_same_run(optimizer, reference)
