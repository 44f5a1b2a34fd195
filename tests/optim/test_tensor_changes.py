"""Whatever a user does to tensors and state between two steps: it is noticed, and nothing stale is written to."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from references import (
    LAYOUT_SHAPE,
    LAYOUTS,
    assert_same_run,
    make_grads,
    make_params,
    moment_dtype,
    run_beside_torch,
    same_bits,
    step_both,
)
from torch import Tensor

from nexus.optim import FusedAdamW

SENTINEL = 12345.0


# Storage that is swapped under a parameter: a stale pointer is never written through.


def swap_data(param: Tensor, new: Tensor) -> None:
    param.data = new


def swap_set(param: Tensor, new: Tensor) -> None:
    with torch.no_grad():
        param.set_(new)


def swap_tensors(param: Tensor, new: Tensor) -> None:
    grad, other = param.grad, torch.nn.Parameter(new)
    param.grad = None
    torch.utils.swap_tensors(param, other)
    param.grad = grad


@pytest.mark.parametrize("swap", [swap_data, swap_set, swap_tensors])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_swapped_storage_is_followed(backend: str, layout: str, swap: Callable[[Tensor, Tensor], None]) -> None:
    params = make_params([LAYOUT_SHAPE, (7,)])
    optimizer, reference = run_beside_torch(params, backend)
    for _ in range(2):  # the second time, from one such storage to the next
        old = params[0].data
        new = LAYOUTS[layout](old.clone())
        swap(params[0], new)
        old.fill_(SENTINEL)
        address = params[0].data_ptr()
        step_both(optimizer, reference)
        assert params[0].data_ptr() == address
        assert (old == SENTINEL).all()
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_that_changes_its_dtype_takes_its_moments_along(backend: str, dtype: torch.dtype) -> None:
    module = torch.nn.Linear(3, 4)
    params = list(module.parameters())
    optimizer, reference = run_beside_torch(params, backend)
    module.to(dtype)
    reference.dtypes = [dtype] * len(params)
    with torch.no_grad():
        for expected, param in zip(reference.params, params, strict=True):
            expected.copy_(param)
            param.grad = None
    step_both(optimizer, reference, steps=1)
    for param in params:
        assert param.dtype == dtype
        assert optimizer.state[param]["exp_avg"].dtype == moment_dtype(dtype)
        assert optimizer.state[param]["exp_avg"].shape == param.shape
    if dtype != torch.float64:  # there, moments that were rounded to float32 go on
        step_both(optimizer, reference)
        assert_same_run(optimizer, reference)


# Gradients.


def new_storage(param: Tensor, grad: Tensor) -> None:
    param.grad = grad.clone()


def in_place(param: Tensor, grad: Tensor) -> None:
    param.grad.copy_(grad)


def swapped_data(param: Tensor, grad: Tensor) -> None:
    param.grad.data = grad.clone()


def freed_and_new(param: Tensor, grad: Tensor) -> None:
    param.grad = None
    param.grad = grad.clone()


def accumulated(param: Tensor, grad: Tensor) -> None:
    param.grad.zero_()
    param.grad.add_(grad)


def set_anew(param: Tensor, grad: Tensor) -> None:
    param.grad.set_(grad.clone())


def as_transposed(param: Tensor, grad: Tensor) -> None:
    param.grad = grad.t().contiguous().t()


CHANGES = [new_storage, in_place, swapped_data, freed_and_new, accumulated, set_anew, as_transposed]


def test_gradients_are_read_where_they_are(backend: str) -> None:
    params = make_params([(6, 7), (3, 2)])
    optimizer, reference = run_beside_torch(params, backend)
    for change in [change for change in CHANGES for _ in range(2)] * 2:
        grads = make_grads(params)
        for param, grad in zip(params, grads, strict=True):
            change(param, grad)
        reference.step(grads)
        optimizer.step()
        assert_same_run(optimizer, reference, change.__name__)


def test_gradients_are_not_kept_alive(backend: str) -> None:
    params = make_params([(5,), (6, 4)])
    optimizer, _ = run_beside_torch(params, backend)
    params[1].grad = torch.ones(4, 6).t()  # is copied
    optimizer.step()
    graves = [weakref.ref(param.grad) for param in params]
    storages = [weakref.ref(param.grad.untyped_storage()) for param in params]
    optimizer.zero_grad()
    assert [grave() for grave in graves + storages] == [None] * 4


# The optimizer's state.


def test_moments_replaced_by_hand(backend: str) -> None:
    params = make_params([(6, 7), (5,)])
    optimizer, reference = run_beside_torch(params, backend)
    state, expected = optimizer.state[params[0]], reference.state(0)
    old = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
    for name, tensor in old.items():
        state[name] = tensor * 2
        expected[name].mul_(2)
        tensor.fill_(SENTINEL)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
    assert all((tensor == SENTINEL).all() for tensor in old.values())
    # Of another layout and dtype: taken over for what they are worth.
    state["exp_avg"] = state["exp_avg"].double().t().contiguous().t()
    state["step"] = torch.tensor(float(state["step"]))  # as torch's
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


def set_moment(name: str, value: object) -> Callable[[FusedAdamW, Tensor], None]:
    return lambda optimizer, param: optimizer.state[param].update({name: value})


def change_shape(optimizer: FusedAdamW, param: Tensor) -> None:
    param.data = torch.zeros(6)
    param.grad = torch.ones(6)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (set_moment("exp_avg", torch.zeros(4)), r"parameter 0 of group 0: state 'exp_avg' must be of shape \(5,\)"),
        (set_moment("exp_avg_sq", 3.0), r"state 'exp_avg_sq' must be of shape \(5,\) on \S+, got float"),
        (change_shape, r"parameter 0 of group 0: state 'exp_avg' must be of shape \(6,\)"),
    ],
    ids=["another shape", "no tensor", "the parameter's shape changes"],
)
def test_moments_that_do_not_fit_are_refused(
    backend: str, spoil: Callable[[FusedAdamW, Tensor], None], words: str
) -> None:
    params = make_params([(5,), (4,)])
    optimizer, _ = run_beside_torch(params, backend)
    spoil(optimizer, params[0])
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert same_bits(before, params)
    del optimizer.state[params[0]]
    optimizer.step()  # begins anew
    assert not any(torch.equal(*pair) for pair in zip(before, params, strict=True))


@pytest.mark.parametrize("amsgrad", [True, False])
def test_amsgrad_switched_while_training(backend: str, amsgrad: bool) -> None:
    params = make_params([(6, 7), (5,)])
    optimizer, reference = run_beside_torch(params, backend, amsgrad=amsgrad)
    optimizer.param_groups[0]["amsgrad"] = reference.optimizer.param_groups[0]["amsgrad"] = not amsgrad
    for index in range(len(params)):  # torch wants it to be there
        reference.state(index).setdefault("max_exp_avg_sq", torch.zeros_like(reference.params[index]))
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
