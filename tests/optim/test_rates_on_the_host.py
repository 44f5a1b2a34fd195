"""A rate on the CPU for parameters elsewhere: on the meta device, on the CPU again, or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, make_grads, make_params, set_grads, step_both
from torch import Tensor

from nexus.backends.interface import DevicePlan, Plan
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.optim.groups import ParamGroup, settings_of

RATES = (0.25, 0.0, 0.5)


def a_group(lr: Tensor, params: list[Any]) -> ParamGroup:
    return ParamGroup({**FusedAdamW(make_params([(1,)])).param_groups[0], "lr": lr, "params": params})


def test_a_rate_on_the_cpu_is_copied_to_the_parameters_device() -> None:
    elsewhere = torch.device("meta")
    group = a_group(torch.tensor(0.5), [torch.zeros(3, device=elsewhere)])
    rate = settings_of(group, {}, elsewhere)["lr"]
    assert rate.host is group["lr"]
    assert rate.tensor is not None
    assert rate.tensor.device == elsewhere


def test_a_rate_on_another_device_is_refused_unless_nothing_there_uses_it() -> None:
    lr = torch.tensor(0.5, device="meta")
    with pytest.raises(
        ValueError, match="lr is a tensor on meta, and parameters of its group are on cpu: make it there"
    ):
        settings_of(a_group(lr, make_params([(3,)])), {}, torch.device("cpu"))
    unused = settings_of(a_group(lr, [torch.zeros(3, device="meta")]), {}, torch.device("cpu"))["lr"]
    assert unused.tensor is None


def test_a_rate_on_the_host_is_read_at_each_step(backend: str) -> None:
    params = make_params([(5,), (3, 2)])
    host = torch.tensor(0.25, dtype=torch.float64, device="cpu")
    optimizer, reference = FusedAdamW(params, lr=host.to(params[0].device), backend=backend), Float64AdamW(params)
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
    reference, optimizer = Float64AdamW(params, lr=0.25), FusedAdamW(params, lr=lr, backend=name)
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
