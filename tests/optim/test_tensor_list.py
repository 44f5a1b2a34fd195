"""Tensors of every size and layout, and those that no kernel can take."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from references import (
    LAYOUT_SHAPE,
    LAYOUTS,
    MOMENT,
    PARAMS,
    Float64AdamW,
    assert_close,
    assert_same_parameter,
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
    [
        [(5,), (0,)],
        [(0,), (5,)],
        [(0,)],
        [(5,), (0, 3), (7,), (3, 0), ()],
        [()],
        [(), (0,), ()],
    ],
    ids=str,
)
def test_empty_tensors_hide_no_others(backend: str, shapes: list[tuple[int, ...]]) -> None:
    pair = run_beside_torch(make_params(shapes), backend, max_grad_norm=1.0)
    assert_same_run(*pair)


def test_an_empty_gradient_of_another_layout_hides_no_others(backend: str) -> None:
    params = make_params([(5, 0), (7,)])
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(params)
    for _ in range(3):
        grads = [torch.zeros(5, 8)[:, :0], torch.ones(7)]
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_an_empty_group_and_one_without_gradients(backend: str, empty: int) -> None:
    params = make_params([(5,), (6,)])
    idle = make_params([(4,)])
    groups = [{"params": [params[0]]}, {"params": [params[1]], "lr": 0.1}, {"params": idle}]
    groups.insert(empty, {"params": []})
    optimizer = FusedAdamW(groups, lr=1e-2, backend=backend)
    reference = Float64AdamW([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.1}], lr=1e-2)
    before = idle[0].detach().clone()
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
    for index, param in enumerate(params):
        assert_same_parameter(optimizer, param, reference, index)
    assert torch.equal(idle[0], before)
    assert idle[0] not in optimizer.state


def test_nothing_at_all_to_update(backend: str) -> None:
    params = make_params([(5,)])
    optimizer = FusedAdamW(params, backend=backend, max_grad_norm=1.0)
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state
    assert float(optimizer.grad_norm) == 0.0


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
    expected = {"param": reference.params[0], **reference.state(0)}
    for name in ("exp_avg", "exp_avg_sq"):
        actual = torch.stack([optimizer.state[p][name] for p in params])
        assert_close(actual, expected[name], MOMENT[torch.float32], name)
    assert_close(torch.stack(params), expected["param"], PARAMS[torch.float32])
    assert {int(optimizer.state[param]["step"]) for param in params} == {3}


# Layouts: parameter and gradient in all combinations.


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_parameter_and_gradient(backend: str, layout: str, grad_layout: str) -> None:
    options = {"lr": 1e-2, "amsgrad": True, "max_grad_norm": 1.0}
    start = make_params([LAYOUT_SHAPE, (6,)])
    params = [torch.nn.Parameter(LAYOUTS[layout](start[0].detach())), copies(start)[1]]
    optimizer, reference = FusedAdamW(params, backend=backend, **options), Float64AdamW(start, **options)
    assert params[0].is_contiguous() == (layout in ("contiguous", "offset", "as_strided"))
    for step in range(6):
        grads = make_grads(start)
        reference.step(grads)
        # An expanded gradient and another layout come in between.
        laid_out = grads[0].contiguous() if step == 3 else LAYOUTS[grad_layout](grads[0])
        set_grads(params, [laid_out, grads[1]])
        optimizer.step()
        assert params[0].stride() == LAYOUTS[layout](start[0].detach()).stride()
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expanded_gradient(backend: str, dtype: torch.dtype) -> None:
    start = make_params([(4, 5), (3,)], dtype)
    params = copies(start)
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(start)
    for step in range(5):
        grads = [torch.full((1, 5), 1.0 + step, dtype=dtype).expand(4, 5), torch.ones((), dtype=dtype).expand(3)]
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


def test_a_copied_gradient_may_change_its_dtype(backend: str) -> None:
    start = make_params([(3, 4)], torch.bfloat16)
    params = copies(start)
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(start)
    for dtype in (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16):
        grads = [torch.randn(4, 3).to(dtype).t()]
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
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


def test_shared_memory_is_refused() -> None:
    base = torch.zeros(10)
    params = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[5:])]
    set_grads(params, make_grads(params))
    optimizer = FusedAdamW(params, backend="native")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0 and 1 .* share memory"):
            optimizer.step()
    assert not base.any()


def test_memory_that_comes_to_be_shared_is_refused() -> None:
    params = make_params([(6,), (6,)])
    optimizer, _ = run_beside_torch(params, "native")
    params[0].data = params[1].data
    before = params[1].detach().clone()
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert torch.equal(params[1], before)
    params[0].data = before.clone()
    optimizer.step()
    assert not torch.equal(params[0], before)


def test_slices_that_share_memory_are_refused(backend: str) -> None:
    base = torch.zeros(4, 4)
    params = [torch.nn.Parameter(base[:, :3]), torch.nn.Parameter(base[:, 2:])]
    set_grads(params, [torch.ones(4, 3), torch.ones(4, 2)])
    with pytest.raises(ValueError, match="parameter 1 of group 0 shares memory with parameter 0 of group 0"):
        FusedAdamW(params, backend=backend).step()
    itself = torch.nn.Parameter(torch.zeros(4).as_strided((2, 2), (1, 1)))
    itself.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match="shares memory with itself"):
        FusedAdamW([itself], backend=backend).step()
    assert not base.any()
    assert not itself.any()


def test_slices_side_by_side_share_no_memory(backend: str) -> None:
    base = torch.zeros(4, 5)
    params = [torch.nn.Parameter(base[:, :2]), torch.nn.Parameter(base[:, 2:])]
    pair = run_beside_torch(params, backend)
    assert_same_run(*pair)
    assert base.all()


def test_sparse_gradients_are_refused(backend: str) -> None:
    params = make_params([(4, 3), (4, 3)])
    optimizer, _ = run_beside_torch(params, backend)
    before = snapshot(optimizer)
    for spoil in (1, 0):
        grads = make_grads(params)
        grads[spoil] = grads[spoil].to_sparse()
        set_grads(params, grads)
        with pytest.raises(RuntimeError, match=rf"parameter {spoil} of group 0 .*sparse gradients.*SparseAdam"):
            optimizer.step()
        assert same_bits(before, snapshot(optimizer))
    step_both(optimizer, Float64AdamW(params))  # it goes on


@pytest.mark.parametrize("what", ["parameter", "gradient"])
def test_freed_memory_is_refused(backend: str, what: str) -> None:
    params = make_params([(4, 3), (4, 3)])
    optimizer, _ = run_beside_torch(params, backend)
    freed = params[0] if what == "parameter" else params[0].grad
    before = params[1].detach().clone()
    freed.data.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 .*storage was freed"):
        optimizer.step()
    assert torch.equal(params[1], before)


def test_a_gradient_of_another_device_is_refused(backend: str) -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    other = torch.nn.Parameter(torch.zeros(3))
    optimizer = FusedAdamW([param, other], backend=backend)
    param.grad = torch.ones(3)
    optimizer.step()
    param.data = torch.zeros(4)  # a gradient of another shape than its parameter
    with pytest.raises(RuntimeError, match=r"parameter 0 .*shape \(4,\).*gradient of shape \(3,\)"):
        optimizer.step()
