"""A rate on the CPU for parameters elsewhere: on the meta device, on the CPU again, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import assert_same_run, make_grads, make_params, run_beside_torch, set_grads, step_both
from torch import Tensor

from nexus.backends.interface import DevicePlan, Plan
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.optim.groups import ParamGroup, settings_of

RATES = (0.25, 0.0, 0.5)


def rate_of(lr: Tensor, params: list[Any], device: str) -> Any:
    """What a step on this device is given for the rate of a group."""
    group = ParamGroup({**FusedAdamW(make_params([(1,)])).param_groups[0], "lr": lr, "params": params})
    return settings_of(group, {}, torch.device(device))["lr"]


def test_a_rate_on_the_cpu_is_copied_to_the_parameters_device() -> None:
    lr = torch.tensor(0.5)
    rate = rate_of(lr, [torch.zeros(3, device="meta")], "meta")
    assert rate.host is lr
    assert rate.tensor.device == torch.device("meta")


def test_a_rate_on_another_device_is_refused_unless_nothing_there_uses_it() -> None:
    lr = torch.tensor(0.5, device="meta")
    words = "lr is a tensor on meta, and parameters of its group are on cpu: make it there"
    with pytest.raises(ValueError, match=words):
        rate_of(lr, make_params([(3,)]), "cpu")
    assert rate_of(lr, [torch.zeros(3, device="meta")], "cpu").tensor is None


def test_a_rate_on_the_host_is_read_at_each_step(backend: str) -> None:
    params = make_params([(5,), (3, 2)])
    host = torch.tensor(0.25, dtype=torch.float64, device="cpu")
    optimizer, reference = run_beside_torch(params, backend, steps=0, lr=host.to(params[0].device))
    grads = make_grads(params)
    set_grads(params, grads)
    runner = engine_of(optimizer).prepare(vars(optimizer))
    plan = engine_of(optimizer).make_plan(vars(optimizer))
    ((device, of_device),) = plan.devices.items()
    of_device.groups[0]["lr"].host = host
    of_device.groups[0]["lr"].tensor = torch.zeros((), dtype=torch.float64)
    runner.bind(Plan(plan.parameters, {device: DevicePlan(**vars(of_device))}), vars(optimizer))
    for value in RATES:
        host.fill_(value)
        reference.optimizer.param_groups[0]["lr"] = value
        reference.step(grads)
        runner.step(None, None)
    assert_same_run(optimizer, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton", "reference"])
def test_a_rate_on_the_cpu_for_parameters_on_a_gpu(name: str) -> None:
    lr = torch.tensor(0.25)
    params = [param.detach().cuda().requires_grad_() for param in make_params([(5,), (3, 2)])]
    optimizer, reference = run_beside_torch(params, name, steps=0, lr=lr)
    for value in RATES:
        lr.fill_(value)
        reference.optimizer.param_groups[0]["lr"] = value
        step_both(optimizer, reference, steps=1, grads=[torch.randn_like(param) for param in params])
    assert_same_run(optimizer, reference)
    assert optimizer.param_groups[0]["lr"] is lr
    if name == "cuda":
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="a rate is a tensor on the CPU"), torch.cuda.graph(graph):
            optimizer.step()
