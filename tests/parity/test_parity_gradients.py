"""Parameters and gradients: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import LAYOUT_SHAPE, LAYOUTS, Float64AdamW, make_grads, make_params, set_grads, step_both
from side_by_side import (
    Make,
    assert_outcomes,
    assert_same,
    both,
    fails,
    fused_torch,
    outcomes,
    param,
    params_of,
    same_of_both,
    same_on_every_backend,
    state_of,
    train,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from nexus.optim import FusedAdamW

THEME = "Parameters and gradients"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def numbers(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def off_by(make: Make, layout: str, grad_layout: str) -> float:
    """How far float64 parameters are from a run of contiguous ones, after three steps at a rate of 0.1."""
    start = make_params([LAYOUT_SHAPE], torch.float64)
    own = torch.nn.Parameter(LAYOUTS[layout](start[0].detach()))
    optimizer, reference = make([own], lr=0.1), Float64AdamW(start, lr=0.1)
    for _ in range(3):
        step_both(optimizer, reference, steps=1, grads=[LAYOUTS[grad_layout](make_grads(start)[0])])
    return (own - reference.params[0]).abs().max().item()


LAYOUTS_OF_GRADIENTS = ("channels_last", "transposed", "every other")
NOT_DENSE = ("sliced", "every other")


@pytest.mark.parity(
    "a gradient with other strides than its parameter's, as `torch.autograd.grad` may return it",
    torch="wrong without a word: in three steps at a rate of 0.1, parameters are off by more than 0.1",
    nexus="right, through a copy of the gradient",
    why="a gradient that is set by hand may have any strides",
    also=("test_layouts.py::test_every_layout_of_parameter_and_gradient",),
)
@pytest.mark.parametrize(
    ("layout", "grad_layout"),
    [
        *(("contiguous", each) for each in LAYOUTS_OF_GRADIENTS),
        *((each, "contiguous") for each in (*LAYOUTS_OF_GRADIENTS, *NOT_DENSE)),
        *((each, each) for each in NOT_DENSE),
    ],
)
def test_layouts_that_torch_alone_gets_wrong(layout: str, grad_layout: str) -> None:
    first, second = both(lambda make: off_by(make, layout, grad_layout))
    assert first > 0.1
    assert second < 1e-14


@pytest.mark.parity(
    "an expanded gradient, as `torch.autograd.grad` returns that of a sum",
    torch="wrong without a word: it reads memory past the one element there is",
    nexus="right, through a copy of the gradient",
    why="a gradient that is set by hand may have any strides",
    also=("test_layouts.py::test_every_layout_of_parameter_and_gradient",),
)
@outcomes(torch=[[1.0, 5.0, 5.0, 5.0], [1.0, 5.0, 1.0, 5.0]], nexus=[[1.0] * 4, [1.0, 1.0, 5.0, 5.0]])
def test_gradients_as_autograd_returns_them(make: Make) -> object:
    expanded, transposed = param(4), param(2, 2)
    optimizer = make([expanded, transposed], betas=(0.0, 0.999))
    (as_returned,) = torch.autograd.grad(expanded.sum(), expanded)
    expanded.grad = numbers(1.0, 5.0, 5.0, 5.0)[:1].expand(4)
    assert expanded.grad.stride() == as_returned.stride() == (0,)
    (transposed.grad,) = torch.autograd.grad((transposed.t() * numbers(1.0, 5.0).expand(2, 2)).sum(), transposed)
    optimizer.step()
    return [state_of(optimizer, index)["exp_avg"].flatten().tolist() for index in range(2)]


@pytest.mark.parity(
    "a parameter that is a slice and not dense, with the gradient of `backward()` or one of its own strides",
    torch="wrong without a word, and what lies between its elements is updated too",
    nexus="right, through a copy; what lies between is not touched",
    why="a view of a larger tensor is an ordinary parameter",
    also=("test_layouts.py::test_slices_side_by_side_share_no_memory",),
)
@pytest.mark.parametrize("layout", NOT_DENSE)
@outcomes(torch=(False, True), nexus=(True, False))
def test_a_parameter_that_is_not_dense(make: Make, layout: str) -> object:
    whole = torch.ones(2, 6, dtype=torch.float64)
    mine, others = (whole[:, :3], whole[:, 3:]) if layout == "sliced" else (whole[:, ::2], whole[:, 1::2])
    own = torch.nn.Parameter(mine)
    own.sum().backward()
    make([own], lr=0.5).step()
    return bool((others == 1.0).all()), off_by(make, layout, "contiguous") > 0.1


@pytest.mark.parity(
    "a gradient of another number of elements than its parameter's, as after `p.data = ...`",
    torch="no error: for a parameter that has grown, memory past the gradient is read",
    nexus="`RuntimeError` that names the parameter",
    why="there is no right update",
    also=("test_layouts.py::test_a_gradient_that_cannot_be_read_is_refused",),
)
@outcomes(
    torch=pytest.approx([0.1, 0.1, 0.1, 0.7, 0.7]),
    nexus=fails(RuntimeError, r"parameter 0 of group 0 of shape \(5,\).*a gradient of shape \(3,\)"),
)
def test_a_gradient_of_another_shape(make: Make) -> object:
    own = param(3)
    optimizer = make([own], lr=0.5)
    own.grad = numbers(1.0, 1.0, 1.0, 7.0, 7.0)[:3]
    own.data = torch.ones(5, dtype=torch.float64)
    optimizer.step()
    return state_of(optimizer)["exp_avg"].tolist()


@pytest.mark.parity(
    "a gradient of another dtype than its parameter's (`p.grad_dtype`)",
    torch="`RuntimeError`",
    nexus="taken, for parameters and gradients of all four floating-point types",
    why="gradients that are accumulated in float32 for parameters in bfloat16 need no cast",
    also=("test_adamw.py::test_gradients_of_any_other_dtype_equal_torch",),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_a_gradient_of_another_dtype(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    def step(make: Make) -> list[float]:
        own = param(3, dtype=dtype)
        set_grads([own], [torch.ones(3, dtype=grad_dtype)])
        make([own], lr=0.25, weight_decay=0.0, eps=0.0).step()
        return own.tolist()

    refused = fails(RuntimeError, r"expected scalar type|must be on the same device and the same dtype")
    assert_outcomes(step, [0.75] * 3 if dtype == grad_dtype else refused, [0.75] * 3)


@pytest.mark.parity(
    "a sparse gradient",
    torch="`RuntimeError` that names `SparseAdam`",
    also=("test_layouts.py::test_a_gradient_that_cannot_be_read_is_refused",),
)
@outcomes(
    torch=fails(RuntimeError, "^Adam does not support sparse gradients, please consider SparseAdam instead$"),
    nexus=fails(RuntimeError, "^parameter 0 of group 0 has a gradient of layout .*sparse_coo.*SparseAdam"),
)
def test_a_sparse_gradient(make: Make) -> object:
    own = param(3, 3)
    own.grad = torch.eye(3, dtype=torch.float64).to_sparse()
    return make([own]).step()


@pytest.mark.parity(
    "complex parameters",
    torch="refused with `fused=True`, in the first step; taken without, as pairs of real numbers",
    nexus="`TypeError` by the constructor, which says to optimize `torch.view_as_real(p)`",
    why="that view is what torch steps too, and the caller can make it",
)
def test_complex_parameters() -> None:
    own = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    view = torch.view_as_real(own.detach().clone()).requires_grad_()
    own.grad, view.grad = torch.ones_like(own), torch.view_as_real(torch.ones_like(own))
    torch.optim.AdamW([own], fused=False).step()
    FusedAdamW([view]).step()
    torch.testing.assert_close(torch.view_as_complex(view), own)
    with pytest.raises(RuntimeError, match="requires all the params to be floating point Tensors"):
        fused_torch([own]).step()
    with pytest.raises(TypeError, match=r"torch.complex64; FusedAdamW takes .*optimize torch.view_as_real\(p\)"):
        FusedAdamW([own])


@pytest.mark.parity(
    "a parameter that no kernel can update and that is to be trained: a lazy module's",
    torch="taken by the constructor, and left alone without a gradient",
    nexus="`TypeError` by the constructor",
    why="an error belongs where the mistake is",
    also=("test_arguments.py::test_parameters_that_cannot_be_optimized",),
)
@outcomes(torch=None, nexus=fails(TypeError, "parameter 0 of group 0 is"))
def test_parameters_that_no_kernel_can_update(make: Make) -> object:
    return make([torch.nn.LazyLinear(3).weight]).step()


@pytest.mark.parity(
    "a parameter of a tensor subclass that wraps others, as torchao's",
    torch="taken, if the subclass implements the operators of the update",
    nexus="`TypeError` by the constructor, save for DTensors",
    why="a kernel needs the memory, and only the subclass knows what is in it",
    also=("test_arguments.py::test_parameters_that_cannot_be_optimized",),
)
@outcomes(
    torch=pytest.approx([0.899] * 3),
    nexus=fails(TypeError, "TwoTensor; FusedAdamW takes plain tensors and DTensors of such"),
)
def test_wrapped_parameters(make: Make) -> object:
    own = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    own.grad = TwoTensor(torch.ones(3), torch.ones(3))
    make([own], lr=0.1).step()
    return own.a.tolist()


@pytest.mark.parity(
    "a model under `FakeTensorMode`, for an estimate of its memory",
    torch="makes the state, of fake tensors",
    also=("test_onlookers.py::test_an_estimate_of_memory_is_the_real_steps",),
)
@same_of_both
def test_fake_tensors(make: Make) -> object:
    with FakeTensorMode():
        own = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = make([own])
        own.grad = torch.ones(3, 4)
        optimizer.step()
        state = state_of(optimizer)
    found = [(state[name].shape, state[name].dtype) for name in ("exp_avg", "exp_avg_sq")]
    assert found == [((3, 4), torch.float32)] * 2
    return found


@pytest.mark.parity(
    "a model on the meta device that gets its memory after the optimizer was made (`model.to_empty()`)",
    torch="is not trained, without a word: it has other parameters then",
    nexus="`RuntimeError` by `step()`, which says what to do",
    why="nobody means to train nothing. Where `to_empty()` keeps the parameters "
    "(`set_swap_module_params_on_conversion`), both train them",
    also=(
        "test_models.py::test_an_optimizer_of_a_model_on_meta_trains_once_it_has_memory",
        "test_models.py::test_what_stays_on_meta_is_left_alone_as_by_torch",
    ),
)
@outcomes(torch=True, nexus=fails(RuntimeError, "on the meta device and cannot be updated"))
def test_memory_after_the_optimizer(make: Make) -> object:
    with torch.device("meta"):
        module = torch.nn.Linear(3, 2)
    optimizer = make(module.parameters(), lr=0.1)
    module.to_empty(device="cpu").reset_parameters()
    module(torch.ones(3)).sum().backward()
    before = module.weight.detach().clone()
    optimizer.step()
    return torch.equal(module.weight, before)


@pytest.mark.parity(
    "parameters that share memory, as two slices of one tensor or an expanded one",
    torch="no error: what they share is updated twice",
    nexus="`ValueError` by the constructor or the first step",
    why="tied weights are one parameter, which both take; this is a mistake",
    also=(
        "test_layouts.py::test_shared_memory_is_refused",
        "test_counters.py::test_tied_weights_are_updated_once",
    ),
)
def test_parameters_that_share_memory() -> None:
    def step(make: Make) -> list[float]:
        whole = torch.ones(4, dtype=torch.float64)
        own = [torch.nn.Parameter(whole[:3]), torch.nn.Parameter(whole[1:])]
        set_grads(own, [torch.ones_like(each) for each in own])
        make(own, lr=0.1, weight_decay=0.0, eps=0.0).step()
        return whole.tolist()

    assert_outcomes(step, pytest.approx([0.9, 0.8, 0.8, 0.9]), fails(ValueError, "share memory"))
    expanded = torch.nn.Parameter(torch.zeros(1).expand(3))
    refused = fails(ValueError, "expanded tensor, whose elements share memory")
    assert_outcomes(lambda make: make([expanded]).step(), None, refused)


@pytest.mark.parity(
    "a parameter without a gradient, in some steps or in all; one that needs none",
    torch="is left alone, has no state before its first gradient, and its count stands still",
    also=(
        "test_counters.py::test_each_parameter_counts_its_own_updates",
        "test_faults.py::test_a_parameter_frozen_and_unfrozen_in_mid_run",
    ),
)
@same_on_every_backend
def test_missing_gradients(make: Make) -> object:
    own = make_params([(5,), (3,), (4,), (2,), (4,)], torch.float64)
    own[4].requires_grad_(False)
    optimizer = make([{"params": own[:3]}, {"params": own[3:4]}, {"params": own[4:]}], lr=0.1)
    optimizer.step()  # without any
    assert not optimizer.state
    for step in range(6):
        comes = [True, step % 2, step >= 4, False, False]
        set_grads(own, [grad if here else None for grad, here in zip(make_grads(own), comes, strict=True)])
        optimizer.step()
    assert [int(optimizer.state[each]["step"]) for each in own if each in optimizer.state] == [6, 3, 2]
    return optimizer


@pytest.mark.parity(
    "0-dim and empty parameters, wherever they stand in the list",
    torch="taken; an empty one has state and a count",
    also=("test_adamw.py::test_every_size_equals_torch",),
)
@pytest.mark.parametrize(
    "shapes", [[(), (0,), (5,)], [(5,), (0, 3), (7,), (3, 0), ()], [(0,)], [(5,), (0,)], [(), (0,), ()]], ids=str
)
@same_on_every_backend
def test_0_dim_and_empty_parameters(make: Make, shapes: list[tuple[int, ...]]) -> object:
    optimizer = make(make_params(shapes, torch.float64), lr=0.1)
    train(optimizer)
    assert [int(state_of(optimizer, index)["step"]) for index in range(len(shapes))] == [3] * len(shapes)
    return optimizer


@pytest.mark.parity(
    "NaN and infinite gradients",
    torch="go into the parameters and moments",
    nexus="same, unless `skip_nonfinite=True`",
    why="the option lets such a step change nothing",
    also=(
        "test_adamw.py::test_values_at_the_edge_go_where_torchs_go",
        "test_counters.py::test_a_step_that_is_not_finite_changes_nothing",
    ),
)
def test_gradients_that_are_not_finite() -> None:
    def run(make: Make, **options: bool) -> torch.optim.Optimizer:
        own = param(4)
        own.grad = numbers(1.0, torch.nan, torch.inf, -torch.inf)
        optimizer = make([own], lr=0.1, **options)
        optimizer.step()
        return optimizer

    first, second = both(run)
    assert_same(first, second)
    assert params_of(second)[0].isnan().tolist() == [False, True, True, True]
    assert params_of(run(FusedAdamW, skip_nonfinite=True))[0].tolist() == [1.0] * 4


@pytest.mark.parity(
    "autograd notices that a parameter was updated",
    torch="no: a second backward pass through a graph that saved it gives wrong gradients without a word",
    nexus="yes: it is `RuntimeError: ... modified by an inplace operation`",
    why="torch's other implementations notice, too",
    also=("test_hooks.py::test_an_update_is_seen_by_autograd",),
)
def test_autograd_notices_an_update() -> None:
    def gradient_of_a_second_pass(make: Make, **options: Any) -> list[float]:
        own = param(1)
        optimizer = make([own], lr=0.5, weight_decay=0.0, **options)
        loss = own.square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        own.grad = None
        loss.backward()
        return own.grad.tolist()

    noticed = fails(RuntimeError, "modified by an inplace operation")
    of_the_new_value = pytest.approx([1.0])  # twice 0.5, where the graph saved 1
    assert_outcomes(gradient_of_a_second_pass, of_the_new_value, noticed)
    with noticed:
        gradient_of_a_second_pass(torch.optim.AdamW, fused=False)


@pytest.mark.parity(
    "a model that changes its dtype in mid-run (`model.double()`)",
    torch="`RuntimeError`: the moments keep theirs",
    nexus="its moments go along",
    why="what they hold is as good in the new type",
    also=("test_models.py::test_a_model_is_converted_between_two_steps",),
)
@outcomes(torch=fails(RuntimeError, "expected scalar type Double but found Float"), nexus=(torch.float64, 6))
def test_a_model_that_changes_its_dtype(make: Make) -> object:
    module = torch.nn.Linear(3, 2)
    optimizer = make(module.parameters())
    train(optimizer)
    module.double()
    optimizer.zero_grad()
    train(optimizer)
    return state_of(optimizer)["exp_avg"].dtype, int(state_of(optimizer)["step"])
