"""Tensors of every size and layout, and those that no kernel can take."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
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
    "shapes", [[(5,), (0,)], [(0,), (5,)], [(0,)], [(5,), (0, 3), (7,), (3, 0), ()], [(), (0,), ()]], ids=str
)
def test_empty_tensors_hide_no_others(backend: str, shapes: list[tuple[int, ...]]) -> None:
    assert_same_run(*run_beside_torch(make_params(shapes), backend, max_grad_norm=1.0))


def test_an_empty_gradient_of_another_layout_hides_no_others(backend: str) -> None:
    optimizer, reference = run_beside_torch(make_params([(5, 0), (7,)]), backend)
    step_both(optimizer, reference, grads=[torch.zeros(5, 8)[:, :0], torch.ones(7)])
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
    count = 21_000
    start = torch.randn(count, 2)
    params = [torch.nn.Parameter(row.clone()) for row in start]
    reference = Float64AdamW([start], max_grad_norm=1.0)
    optimizer = FusedAdamW(params, backend="native", max_grad_norm=1.0)
    for _ in range(3):
        grad = torch.randn(count, 2)
        for param, row in zip(params, grad.unbind(), strict=True):
            param.grad = row
        optimizer.step()
        reference.step([grad])
    for name in ("exp_avg", "exp_avg_sq"):
        actual = torch.stack([optimizer.state[p][name] for p in params])
        assert_close(actual, reference.state(0)[name], MOMENT[torch.float32], name)
    assert_close(torch.stack(params), reference.params[0], PARAMS[torch.float32])
    assert {int(optimizer.state[param]["step"]) for param in params} == {3}


# Layouts: parameter and gradient in all combinations.


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_parameter_and_gradient(backend: str, layout: str, grad_layout: str) -> None:
    start = make_params([LAYOUT_SHAPE, (6,)])
    params = [torch.nn.Parameter(LAYOUTS[layout](start[0].detach())), start[1]]
    optimizer, reference = run_beside_torch(params, backend, steps=0, amsgrad=True, max_grad_norm=1.0)
    assert params[0].is_contiguous() == (layout in ("contiguous", "offset", "as_strided"))
    for step in range(6):
        grads = make_grads(start)
        if step == 2:  # an expanded gradient and another layout come in between
            grads[0] = grads[0][:1, :, :1].expand(LAYOUT_SHAPE)
        elif step != 3:
            grads[0] = LAYOUTS[grad_layout](grads[0])
        step_both(optimizer, reference, steps=1, grads=grads)
        assert params[0].stride() == LAYOUTS[layout](start[0].detach()).stride()
    assert_same_run(optimizer, reference)


def test_a_copied_gradient_may_change_its_dtype(backend: str) -> None:
    optimizer, reference = run_beside_torch(make_params([(3, 4)], torch.bfloat16), backend)
    for dtype in (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16):
        step_both(optimizer, reference, steps=1, grads=[torch.randn(4, 3).to(dtype).t()])
    assert_same_run(optimizer, reference)


def test_a_gradient_that_has_a_graph_is_copied_without_it(backend: str) -> None:
    params = copies(make_params([(3, 4)]))
    optimizer = FusedAdamW(params, backend=backend)
    factor = torch.ones(4, 3, requires_grad=True)

    class Hook:
        def __call__(self, grad: Tensor) -> None: ...

    hooks = [Hook() for _ in range(3)]
    for hook in hooks:
        params[0].grad = (factor * 2).t()  # as of backward(create_graph=True)
        params[0].grad.register_hook(hook)
        optimizer.step()
    assert not any(value.requires_grad for value in optimizer.state[params[0]].values())
    graphs = [weakref.ref(hook) for hook in hooks]
    params[0].grad = None
    del hook, hooks
    gc.collect()
    assert [graph() for graph in graphs] == [None] * 3


# What no kernel can take: a clear error, and nothing changed.


@pytest.mark.parametrize(
    ("views", "words"),
    [
        (
            [lambda x: x[:, :3], lambda x: x[:, 2:]],
            "parameter 1 of group 0 shares memory with parameter 0 of group 0",
        ),
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
    params[0].data = params[1].data
    before = params[1].detach().clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0 and 1 .* share memory"):
            optimizer.step()
    assert torch.equal(params[1], before)
    params[0].data = before.clone()
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_slices_side_by_side_share_no_memory(backend: str) -> None:
    base = torch.zeros(4, 5)
    params = [torch.nn.Parameter(base[:, :2]), torch.nn.Parameter(base[:, 2:])]
    assert_same_run(*run_beside_torch(params, backend))
    assert base.all()


def spoil_sparse(param: Tensor) -> None:
    param.grad = param.grad.to_sparse()


def spoil_freed(param: Tensor) -> None:
    param.grad.untyped_storage().resize_(0)


def spoil_shape(param: Tensor) -> None:
    param.data = torch.zeros(4)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_sparse, ".*sparse gradients.*SparseAdam"),
        (spoil_freed, ".*storage was freed"),
        (spoil_shape, r".*shape \(4,\).*gradient of shape \(4, 3\)"),
    ],
)
def test_a_gradient_that_cannot_be_read_is_refused(
    backend: str, spoil: Callable[[Tensor], None], words: str, index: int
) -> None:
    params = make_params([(4, 3), (4, 3)])
    optimizer, reference = run_beside_torch(params, backend)
    before, kept = snapshot(optimizer), params[index].data
    set_grads(params, make_grads(params))
    spoil(params[index])
    with pytest.raises(RuntimeError, match=f"parameter {index} of group 0 {words}"):
        optimizer.step()
    params[index].data, params[index].grad = kept, None
    assert same_bits(before, snapshot(optimizer))
    step_both(optimizer, reference)  # it goes on
    assert_same_run(optimizer, reference)
