"""Rates, schedulers, scalers, processes: rows of docs/parity.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from references import make_grads, make_params, set_grads
from side_by_side import (
    Make,
    assert_same,
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
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine

THEME = "Rates and schedulers"


@pytest.mark.parity(
    "`group['lr']`: a float, an integer, a tensor",
    torch="stays the object that was given, and may become another kind between steps",
    also=("test_rates_torch.py::test_every_hyperparameter_may_change",),
)
@pytest.mark.parity(
    "a tensor rate, and a tensor `weight_decay`, that are written between steps",
    torch="are read at each step",
    also=("test_rates_torch.py::test_a_tensor_rate_is_read_at_every_step",),
)
@same_on_every_backend
def test_kinds_of_rates(make: Make) -> object:
    tensors = [torch.tensor(0.2), torch.tensor([0.3], dtype=torch.float64), torch.full((1, 1, 1), 0.4)]
    rates = [0.1, 1, *tensors, 0.0, 0.05]
    assert all(make([param(1)], lr=rate).param_groups[0]["lr"] is rate for rate in rates)
    decays = [torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2)]
    optimizer = make([{"params": make_params([(5,)], torch.float64), "weight_decay": each} for each in decays])
    for rate in rates:
        for group in optimizer.param_groups:
            group["lr"] = rate
        for _ in range(3):
            train(optimizer, steps=1)
            for written in (rate, *decays):
                if isinstance(written, torch.Tensor):
                    written.mul_(0.5)
        assert all(group["lr"] is rate for group in optimizer.param_groups)
    return optimizer, tensors, decays


MOMENTA = {"base_momentum": torch.tensor(0.85), "max_momentum": torch.tensor(0.95)}
SCHEDULERS: dict[str, Any] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t)),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=25),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 4),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5),
    "OneCycleLR, tensors": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12, **MOMENTA),
    "CyclicLR, tensors": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.05, 0.2, step_size_up=3, **MOMENTA),
}


@pytest.mark.parity(
    "torch's schedulers, over a float rate and over a tensor",
    torch="write `group['lr']`; a tensor is written in place",
    also=("test_drop_in_schedulers.py::test_a_scheduler_drives_it_as_it_drives_torch_and_resumes",),
)
@pytest.mark.parity(
    "`OneCycleLR` and `CyclicLR` with momenta that are tensors, which leave a tensor beside a float in `betas`",
    torch="taken",
    nexus='taken, and the same with `bias_correction="power"`',
    why="where a beta moves, the bias is 1 minus the product of all betas, not 1 - beta**t, unless that is asked for",
)
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
@same_of_both
def test_torchs_schedulers(make: Make, name: str, as_tensor: bool) -> object:
    rate: Any = torch.tensor(0.05, dtype=torch.float64) if as_tensor else 0.05
    own = {"bias_correction": "power"} if make is FusedAdamW and "tensors" in name else {}
    optimizer = make(make_params([(5,)], torch.float64), lr=rate, **own)
    scheduler, rates = SCHEDULERS[name](optimizer), []
    for _ in range(10):
        train(optimizer, steps=1)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert (optimizer.param_groups[0]["lr"] is rate) == as_tensor
    assert len(set(rates)) > 2
    return optimizer, rates


@pytest.mark.parity(
    "a nexus `Schedule` as `lr` or `weight_decay`",
    torch="`TypeError`; as a function in `LambdaLR` it gives the same run",
    nexus="is evaluated where the update runs, at the optimizer's own count; torch's schedulers are refused over it",
    why="two drivers of one rate would overwrite each other",
    also=(
        "test_counters.py::test_the_first_and_last_update_of_every_phase_equal_torchs_loop",
        "test_drop_in_schedulers.py::test_no_scheduler_overwrites_a_schedule",
    ),
)
def test_a_schedule_as_a_rate() -> None:
    schedule = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1, min_lr=0.01)
    for name in ("lr", "weight_decay"):
        with pytest.raises(TypeError, match="not supported between instances of 'float' and 'WSD'"):
            fused_torch([param(1)], **{name: schedule})
    peer, optimizer = fused_torch([param(5)], lr=1.0), FusedAdamW([param(5)], lr=schedule)
    scheduler = lr_scheduler.LambdaLR(peer, schedule)
    for step in range(14):
        grads = make_grads(params_of(peer))
        for each in (peer, optimizer):
            set_grads(params_of(each), grads)
            each.step()
        assert float(optimizer.param_groups[0]["lr"]) == schedule(step) == peer.param_groups[0]["lr"]
        scheduler.step()
    assert_same(peer, optimizer)
    with pytest.raises(RuntimeError, match="takes no scheduler"):
        lr_scheduler.LambdaLR(FusedAdamW([param(1)], lr=Cosine(peak_lr=0.1, total_steps=10)), lambda t: 1.0)


@pytest.mark.parity(
    "GradScaler",
    "`optimizer.grad_scale` and `found_inf`, as `scaler.step` sets them",
    torch="gradients are divided by the scale within the update; with `found_inf` nothing changes, and no count",
    also=("test_clipping.py::test_found_inf_and_grad_scale_of_any_shape",),
)
@same_of_both
def test_scales_and_overflows(make: Make) -> object:
    optimizer = make(make_params([(5,), ()], torch.float64), lr=0.1)
    assert optimizer._step_supports_amp_scaling
    optimizer.grad_scale = torch.tensor(4.0)
    params = params_of(optimizer)
    for step in range(6):
        optimizer.found_inf = torch.tensor(float(step in (0, 3)))
        before = [each.tolist() for each in params]
        set_grads(params, [4 * grad for grad in make_grads(params)])
        optimizer.step()
        assert ([each.tolist() for each in params] == before) == (step in (0, 3))
    assert int(state_of(optimizer)["step"]) == 4
    return optimizer


@pytest.mark.parity(
    "GradScaler",
    "`found_inf` of shape (1,)",
    torch="`RuntimeError`: its count has no dimensions",
    nexus="taken",
    why="one element is one, of however many dimensions",
    also=("test_clipping.py::test_found_inf_and_grad_scale_of_any_shape",),
)
@outcomes(torch=fails(RuntimeError, r"output with shape \[\] doesn't match the broadcast"), nexus=1)
def test_a_found_inf_of_one_dimension(make: Make) -> object:
    optimizer = make([param(3)], lr=0.1)
    for found_inf in (0.0, 1.0):
        optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.tensor([found_inf])
        train(optimizer, steps=1)
    return int(state_of(optimizer)["step"])


@pytest.mark.parity(
    "GradScaler",
    "`p.grad` after a step with a scale",
    torch="is divided by the scale",
    nexus="is left as it was",
    why="a step reads the gradients, and spares the memory traffic of writing them",
)
@outcomes(torch=([2.0], pytest.approx([0.2])), nexus=([8.0], pytest.approx([0.2])))
def test_gradients_after_a_scaled_step(make: Make) -> object:
    own = param(1)
    optimizer = make([own])
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    own.grad = torch.full_like(own, 8.0)
    optimizer.step()
    return own.grad.tolist(), state_of(optimizer)["exp_avg"].tolist()


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.xdist_group("distributed")
@pytest.mark.parity(
    "Several processes",
    "DTensors, as of `fully_shard`",
    torch="are updated through their local parts; moments are DTensors, counts plain tensors",
    also=(
        "test_distributed_fsdp.py::test_fsdp_trains_as_one_process_in_float64",
        "test_distributed_fsdp.py::test_uneven_and_empty_parts_follow_float64_torch",
    ),
)
@pytest.mark.usefixtures("process_group")
@same_of_both
def test_dtensors(make: Make) -> object:
    module = torch.nn.Linear(3, 2).double()
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    optimizer = make(module.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(torch.randn(4, 3).double()).square().sum().backward()
        optimizer.step()
    state = state_of(optimizer)
    assert [isinstance(state[name], DTensor) for name in ("exp_avg", "exp_avg_sq", "step")] == [True, True, False]
    assert int(state["step"]) == 3
    return [each.to_local().detach() for each in (module.weight, state["exp_avg"], state["exp_avg_sq"])]


@pytest.mark.parity(
    "Several processes",
    "`torch.distributed.checkpoint` makes a step at rate 0 with gradients of zeros, to ask for state",
    torch="counts one update",
    nexus="counts none",
    why="asking is to change nothing: a run that is resumed before its first step would be one ahead",
    also=("test_distributed_checkpoint.py::test_asking_for_the_state_before_the_first_step_changes_nothing",),
)
@outcomes(torch=({1}, True), nexus=({0}, True))
def test_asking_for_the_state_before_the_first_step(make: Make) -> object:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    saved = get_optimizer_state_dict(module, make(module.parameters()))
    return {int(state["step"]) for state in saved["state"].values()}, torch.equal(module.weight, before)
