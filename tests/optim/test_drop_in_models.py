"""What users do to a model around its optimizer, as torch lets them: it is updated as `torch.optim.AdamW` would."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor
from torch.nn.utils import parameters_to_vector, parametrizations, vector_to_parameters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from nexus.optim import FusedAdamW
from nexus.schedules import WSD

SCHEDULE = WSD(2, 20, 5, 1e-2)


def pair(module: torch.nn.Module, backend: str, **options: Any) -> tuple[FusedAdamW, Float64AdamW]:
    options = {"lr": 1e-2, **options}
    params = list(module.parameters())
    return FusedAdamW(params, backend=backend, **options), Float64AdamW(params, **options)


def step_with_gradients(optimizer: FusedAdamW, reference: Float64AdamW) -> None:
    """On the gradients that a backward pass has left."""
    reference.step([param.grad for group in optimizer.param_groups for param in group["params"]])
    optimizer.step()


# Memory that processes share.


def child_steps(optimizer: torch.optim.Optimizer, grads: list[list[Tensor]]) -> None:
    params = optimizer.param_groups[0]["params"]
    for round_ in grads:
        set_grads(params, round_)
        optimizer.step()


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_steps_of_another_process_on_shared_parameters_are_seen(way: str) -> None:
    start = make_params([(40,), (3, 2)])
    rounds = [make_grads(start) for _ in range(6)]
    options = {"lr": 1e-2, "amsgrad": True}
    reference, alone = Float64AdamW(start, **options), FusedAdamW(copies(start), **options)
    for grads in rounds:
        reference.step(grads)
    child_steps(alone, rounds)

    module = torch.nn.ParameterList(copies(start)).share_memory()
    optimizer = FusedAdamW(module.parameters(), **options)
    child_steps(optimizer, rounds[:2])
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()
    child_steps(optimizer, rounds[2:3])
    optimizer.zero_grad()
    child = mp.get_context(way).Process(target=child_steps, args=(optimizer, rounds[3:5]))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    child_steps(optimizer, rounds[5:])
    assert same_bits(snapshot(optimizer), snapshot(alone))
    assert_same_run(optimizer, reference)


# Defaults of the process.


@pytest.fixture
def restored_defaults() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("restored_defaults")
@pytest.mark.parametrize("default", ["cpu", "meta", torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01), SCHEDULE], ids=["float", "tensor", "schedule"])
def test_state_is_made_for_the_parameters_whatever_the_defaults(backend: str, lr: Any, default: Any) -> None:
    params = make_params([(5,), (3, 2)])
    options = {"amsgrad": True, "max_grad_norm": 1.0}
    reference = Float64AdamW(params, lr=float(lr) if isinstance(lr, Tensor) else lr, **options)
    rounds = [make_grads(params) for _ in range(8)]
    for grads in rounds:
        reference.step(grads)
    (torch.set_default_device if isinstance(default, str) else torch.set_default_dtype)(default)
    optimizer = FusedAdamW(params, lr=lr, backend=backend, **options)
    for count, grads in enumerate(rounds):
        set_grads(params, grads)
        optimizer.step()
        if count == 2:  # with counts of torch's type
            saved = copy.deepcopy(optimizer.state_dict())
            saved["state"][0]["step"] = saved["state"][0]["step"].float()
            optimizer.load_state_dict(saved)
        if count == 4:  # as some put them there
            optimizer.state[params[1]]["step"] = optimizer.state[params[1]]["step"].float()
        if count == 5:
            optimizer.load_state_dict(optimizer.state_dict())
        if count == 6:
            optimizer.state[params[0]]["step"] = float(optimizer.state[params[0]]["step"])
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    assert_same_run(optimizer, reference)
    assert {value.device for state in optimizer.state.values() for value in state.values()} == {params[0].device}
    assert optimizer.grad_norm.dtype == torch.float64


@pytest.mark.usefixtures("restored_defaults")
def test_a_count_that_is_a_float_is_not_rounded_to_the_default_type(backend: str) -> None:
    params = make_params([(5,)])
    optimizer = FusedAdamW(params, backend=backend)
    set_grads(params, make_grads(params))
    optimizer.step()
    optimizer.state[params[0]]["step"] = 2.0**24 + 1
    torch.set_default_dtype(torch.bfloat16)
    assert float(optimizer.state_dict()["state"][0]["step"]) == 2**24 + 1
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 2**24 + 2


# Parameters that are made, moved or replaced late.


def test_replaced_parameters_are_left_alone_as_by_torch(backend: str) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer, reference = pair(module, backend)
    step_both(optimizer, reference)
    module.weight = torch.nn.Parameter(torch.ones(2, 3))
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(4, 3)).square().sum().backward()
        step_with_gradients(optimizer, reference)
    assert (module.weight == 1).all()
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_model_is_converted_between_two_steps(backend: str, swaps: bool, dtype: torch.dtype) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer, reference = pair(module, backend)
    params = list(module.parameters())
    step_both(optimizer, reference)
    {torch.float64: module.double, torch.bfloat16: module.bfloat16, torch.float16: module.half}[dtype]()
    assert [new is old for new, old in zip(module.parameters(), params, strict=True)] == [True] * 2
    optimizer.zero_grad()
    # The update goes on from float32 moments and parameters, whatever it is made in from now on.
    expected = copy.deepcopy(reference)
    for index, param in enumerate(params):
        expected.dtypes[index] = dtype
        with torch.no_grad():
            expected.params[index].copy_(param)
            for name in ("exp_avg", "exp_avg_sq"):
                expected.state(index)[name].copy_(optimizer.state[param][name])
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, grads)
        expected.step(grads)
        optimizer.step()
    assert_same_run(optimizer, expected)


def test_lazy_modules_once_they_have_run(backend: str) -> None:
    module = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d())
    data = torch.randn(6, 4)
    with pytest.raises(TypeError, match="run the lazy module once before making the optimizer"):
        FusedAdamW(module.parameters(), backend=backend)
    module(data)
    optimizer, reference = pair(module, backend)
    for _ in range(3):
        optimizer.zero_grad()
        module(data).pow(3).sum().backward()
        step_with_gradients(optimizer, reference)
    assert_same_run(optimizer, reference)


# Grad modes.


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("lr", [0.01, SCHEDULE], ids=["float", "schedule"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
def test_steps_under_a_grad_mode_and_without(backend: str, mode: Callable[[], Any], lr: Any, layout: str) -> None:
    params = make_params([(6, 4), (5,)])
    if layout == "sliced":  # is updated through a copy
        params[0] = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    optimizer = FusedAdamW(params, lr=lr, amsgrad=True, max_grad_norm=1.0, backend=backend)
    reference = Float64AdamW(params, lr=lr, amsgrad=True, max_grad_norm=1.0)
    step_in_mode = mode()(optimizer.step)
    for count in range(6):
        grads = make_grads(params)
        set_grads(params, grads)
        reference.step(grads)
        (step_in_mode if count % 2 == 0 else optimizer.step)()
        if count == 3:
            with mode():
                saved = optimizer.state_dict()
                optimizer.state.clear()
                optimizer.load_state_dict(saved)
        if count == 4:
            optimizer.load_state_dict(saved := optimizer.state_dict())
    assert_same_run(optimizer, reference)
    params[1].square().sum().backward()  # parameters are still autograd's


def test_parameters_that_were_made_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():  # torch's AdamW cannot update them outside of it
        params = make_params([(5,), (3, 2)])
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(params)
    step_both(optimizer, reference)
    with torch.inference_mode():
        step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


# What stands between a parameter and its gradient.


def parametrized(wrap: Callable[..., Any]) -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    wrap(module[0])
    return module


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_parametrized_modules(backend: str, wrap: Callable[..., Any]) -> None:
    module = parametrized(wrap)
    optimizer, reference = pair(module, backend, max_grad_norm=0.5)
    start = module[0].weight.detach().clone()
    for _ in range(4):
        optimizer.zero_grad()
        module(torch.randn(5, 4)).square().sum().backward()
        step_with_gradients(optimizer, reference)
    assert_same_run(optimizer, reference)
    assert not torch.equal(module[0].weight, start)


def test_parameters_that_become_parts_of_one_vector(backend: str) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer, reference = pair(module, backend)
    step_both(optimizer, reference)
    vector = parameters_to_vector(module.parameters()).detach().clone() * 2
    vector_to_parameters(vector, module.parameters())
    with torch.no_grad():
        for param in reference.params:
            param.mul_(2)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
    assert torch.equal(vector, parameters_to_vector(module.parameters()))  # written in place


def test_gradients_of_functional_calls(backend: str) -> None:
    module = torch.nn.Linear(3, 2)
    optimizer, reference = pair(module, backend)
    data = torch.randn(4, 3)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, data).square().sum()

    for _ in range(4):
        grads = torch.func.grad(loss)({name: param.detach() for name, param in module.named_parameters()})
        for name, param in module.named_parameters():
            param.grad = grads[name]
        step_with_gradients(optimizer, reference)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))
    optimizer, reference = pair(module, backend, max_grad_norm=1.0)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast(torch.empty(()).device.type, dtype):
            loss = module(torch.randn(5, 4)).float().square().mean()
            loss.backward()
            step_with_gradients(optimizer, reference)  # within, as some loops have it
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_leads_to_the_same_bits(backend: str, use_reentrant: bool) -> None:
    start = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4))
    found = []
    for recomputes in (False, True):
        module = copy.deepcopy(start)
        optimizer = FusedAdamW(module.parameters(), lr=SCHEDULE, max_grad_norm=1.0, backend=backend)
        torch.manual_seed(1)
        for _ in range(4):
            data = torch.randn(5, 4, requires_grad=True)
            optimizer.zero_grad()
            out = checkpoint(module, data, use_reentrant=use_reentrant) if recomputes else module(data)
            out.square().sum().backward()
            optimizer.step()
        found.append(snapshot(optimizer))
    assert same_bits(*found)
    assert not torch.equal(found[0][0], start[0].weight)


# Loops.


@pytest.mark.parametrize("accumulate", [1, 3])
def test_epochs_of_a_data_loader(backend: str, accumulate: int) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    optimizer, reference = pair(module, backend, lr=SCHEDULE, max_grad_norm=1.0)
    where = torch.empty(()).device
    loader = DataLoader(
        TensorDataset(torch.randn(30, 4), torch.randn(30, 1)),
        batch_size=8,
        shuffle=True,
        generator=torch.Generator(where),
    )
    for _ in range(3):
        for count, (x, y) in enumerate(loader):
            (torch.nn.functional.mse_loss(module(x), y) / accumulate).backward()
            if (count + 1) % accumulate == 0:
                step_with_gradients(optimizer, reference)
                optimizer.zero_grad()
    assert reference.completed == 3 * (4 // accumulate)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(SCHEDULE(reference.completed - 1), rel=1e-15)
    assert_same_run(optimizer, reference)
