"""What stands around an optimizer: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import make_params
from side_by_side import Make, both, fused_torch, of_this_torch, params_of, same_of_both, state_of, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nexus.optim import FusedAdamW

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
    param = torch.nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    param.grad = TwoTensor(torch.ones(3), torch.ones(3))
    fused_torch([param], lr=0.1).step()
    assert not torch.equal(param.a, torch.ones(3))
    with pytest.raises(TypeError, match="TwoTensor; FusedAdamW takes plain tensors and DTensors of such"):
        FusedAdamW([param])


@pytest.mark.parity(
    "Parameters and gradients",
    "a model under `FakeTensorMode`, for an estimate of its memory",
    torch="makes the state, of fake tensors",
    nexus="same",
    also=("test_onlookers.py::test_an_estimate_of_memory_is_the_real_steps",),
)
@same_of_both
def test_fake_tensors(make: Make) -> object:
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3, 4))
        optimizer = make([param])
        param.grad = torch.ones(3, 4)
        optimizer.step()
        state = state_of(optimizer)
    found = [(state[name].shape, state[name].dtype) for name in ("exp_avg", "exp_avg_sq")]
    assert found == [(torch.Size([3, 4]), torch.float32)] * 2
    return found


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
        before = params_of(optimizer)[0].tolist()
        with Seen() as seen:
            optimizer.step()
        assert params_of(optimizer)[0].tolist() != before
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
@same_of_both
def test_clipping_before_the_step(make: Make) -> object:
    optimizer = make(make_params([(3, 4), (5,)], torch.float64), lr=0.1)
    norms: list[torch.Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5))
    )
    train(optimizer)
    return optimizer, norms


@pytest.mark.parity(
    "Copies",
    "`swa_utils.AveragedModel` of the trained model",
    torch="averages its parameters",
    nexus="same",
)
@same_of_both
def test_an_averaged_model(make: Make) -> object:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer, average = make(model.parameters(), lr=0.1), torch.optim.swa_utils.AveragedModel(model)
    for _ in range(3):
        train(optimizer, 1)
        average.update_parameters(model)
    return optimizer, average.module.weight.detach()


@pytest.mark.parity(
    "Copies",
    "parameters in shared memory (`model.share_memory()`), before or after the optimizer is made",
    torch="are updated where they are",
    nexus="same",
    also=("test_workers.py::test_steps_of_another_process_are_seen_and_counted",),
)
@same_of_both
def test_shared_memory(make: Make) -> object:
    optimizer = make(torch.nn.Linear(3, 2, dtype=torch.float64).share_memory().parameters(), lr=0.1)
    train(optimizer)
    optimizer.add_param_group({"params": torch.nn.Linear(3, 2, dtype=torch.float64).parameters()})
    for param in params_of(optimizer):
        param.share_memory_()
    train(optimizer)
    assert all(param.is_shared() for param in params_of(optimizer))
    return optimizer


@pytest.mark.parity(
    "Steps and state",
    "`torch.set_default_device` and `set_default_dtype`",
    torch="moments are on the device of their parameter and of its dtype, whatever the defaults are",
    nexus="same",
    also=("test_state.py::test_state_is_made_for_the_parameters_whatever_the_defaults",),
)
@same_of_both
def test_defaults(make: Make) -> object:
    optimizer = make(make_params([(3,)], torch.float64), lr=0.1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(3):
            params_of(optimizer)[0].grad = torch.ones(3, dtype=torch.float64)
            with torch.device("meta"):
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    moment = state_of(optimizer)["exp_avg"]
    assert (moment.device.type, moment.dtype) == ("cpu", torch.float64)
    return optimizer
