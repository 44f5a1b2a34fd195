"""What stands around an optimizer: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import make_grads, make_params, set_grads
from side_by_side import Make, assert_same, both, of_this_torch, params_of, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = of_this_torch


@pytest.mark.parity(
    "Parameters and gradients",
    "a parameter of a tensor subclass that wraps others, as torchao's",
    torch="taken, if the subclass implements the operators of the update",
    nexus="`TypeError` by the constructor, save for DTensors",
    why="a kernel needs the memory, and only the subclass knows what is in it",
    also=("test_arguments.py::test_parameters_that_cannot_be_optimized",),
)
def test_wrapped_parameters() -> None:
    def run(make: Make) -> Any:
        param = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
        optimizer = make([param], lr=0.1)
        param.grad = TwoTensor(torch.ones(3), torch.ones(3))
        optimizer.step()
        return param

    made: list[Any] = []

    def run_or_refuse(make: Make) -> str:
        try:
            made.append(run(make))
        except TypeError as error:
            return str(error)
        return "taken"

    torchs, ours = both(run_or_refuse)
    assert torchs == "taken"
    assert not torch.equal(made[0].a, torch.ones(3))
    assert "TwoTensor; FusedAdamW takes plain tensors and DTensors of such" in ours


@pytest.mark.parity(
    "Parameters and gradients",
    "a model under `FakeTensorMode`, for an estimate of its memory",
    torch="makes the state, of fake tensors",
    nexus="same",
    also=("test_onlookers.py::test_an_estimate_of_memory_is_the_real_steps",),
)
def test_fake_tensors() -> None:
    def run(make: Make) -> list[tuple[torch.Size, torch.dtype]]:
        with FakeTensorMode():
            optimizer = make([torch.nn.Parameter(torch.ones(3, 4))])
            params_of(optimizer)[0].grad = torch.ones(3, 4)
            optimizer.step()
            state = optimizer.state[params_of(optimizer)[0]]
        return [(state[name].shape, state[name].dtype) for name in ("exp_avg", "exp_avg_sq")]

    first, second = both(run)
    assert first == second == [(torch.Size([3, 4]), torch.float32)] * 2


@pytest.mark.parity(
    "Hooks, closures, printing",
    "what a `TorchDispatchMode` sees of a step",
    torch="`aten::_fused_adamw_` and what counts the steps",
    nexus="nothing: no operator of torch runs",
    why="the kernels are called directly, which is where the time of small updates goes",
    also=("test_memory.py::test_a_step_allocates_nothing",),
)
def test_what_a_dispatch_mode_sees() -> None:
    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def run(make: Make) -> list[str]:
        optimizer = make(make_params([(3,)]))
        train(optimizer, 1)
        with Seen() as seen:
            optimizer.step()
        return seen.names

    first, second = both(run)
    assert "aten._fused_adamw_.default" in first
    assert second == []


@pytest.mark.parity(
    "The update",
    "`clip_grad_norm_` before the step",
    torch="scales the gradients, which the step uses",
    nexus="same",
    also=("test_gradients.py::test_gradients_of_every_origin",),
)
def test_clipping_before_the_step() -> None:
    def run(make: Make) -> tuple[torch.optim.Optimizer, float]:
        optimizer = make(make_params([(3, 4), (5,)], torch.float64), lr=0.1)
        params = params_of(optimizer)
        for _ in range(3):
            set_grads(params, make_grads(params))
            norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
        return optimizer, float(norm)

    (first, norm), (second, ours) = both(run)
    assert norm == ours
    assert_same(first, second)


@pytest.mark.parity(
    "Copies",
    "`swa_utils.AveragedModel` of the trained model",
    torch="averages its parameters",
    nexus="same",
    also=("test_drop_in_schedulers.py::test_averaged_models",),
)
def test_an_averaged_model() -> None:
    def run(make: Make) -> tuple[torch.optim.Optimizer, torch.Tensor]:
        model = torch.nn.Linear(3, 2, dtype=torch.float64)
        optimizer, average = make(model.parameters(), lr=0.1), torch.optim.swa_utils.AveragedModel(model)
        for _ in range(3):
            train(optimizer, 1)
            average.update_parameters(model)
        return optimizer, average.module.weight.detach()

    (first, torchs), (second, ours) = both(run)
    assert_same(first, second)
    torch.testing.assert_close(ours, torchs, rtol=1e-14, atol=1e-14)


@pytest.mark.parity(
    "Copies",
    "parameters in shared memory (`model.share_memory()`), before or after the optimizer is made",
    torch="are updated where they are",
    nexus="same",
    also=("test_workers.py::test_steps_of_another_process_are_seen_and_counted",),
)
def test_shared_memory() -> None:
    def run(make: Make) -> tuple[torch.optim.Optimizer, bool]:
        model = torch.nn.Linear(3, 2, dtype=torch.float64).share_memory()
        optimizer = make(model.parameters(), lr=0.1)
        train(optimizer)
        optimizer.add_param_group({"params": torch.nn.Linear(3, 2, dtype=torch.float64).parameters()})
        for param in params_of(optimizer):
            param.share_memory_()
        train(optimizer)
        return optimizer, all(param.is_shared() for param in params_of(optimizer))

    (first, torchs), (second, ours) = both(run)
    assert torchs
    assert ours
    assert_same(first, second)


@pytest.mark.parity(
    "Steps and state",
    "`torch.set_default_device` and `set_default_dtype`",
    torch="moments are on the device of their parameter and of its dtype, whatever the defaults are",
    nexus="same",
    also=("test_state.py::test_state_is_made_for_the_parameters_whatever_the_defaults",),
)
def test_defaults() -> None:
    def run(make: Make) -> tuple[torch.optim.Optimizer, tuple[str, torch.dtype]]:
        optimizer = make(make_params([(3,)], torch.float64), lr=0.1)
        torch.set_default_dtype(torch.bfloat16)
        try:
            for _ in range(3):
                params_of(optimizer)[0].grad = torch.ones(3, dtype=torch.float64)
                with torch.device("meta"):
                    optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        moment = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
        return optimizer, (moment.device.type, moment.dtype)

    (first, torchs), (second, ours) = both(run)
    assert torchs == ours == ("cpu", torch.float64)
    assert_same(first, second)
