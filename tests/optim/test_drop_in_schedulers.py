"""torch's schedulers, scalers and averages of models around a FusedAdamW: all that there are, as torch has them."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import PARAMS as TOLERANCE
from references import (
    Float64AdamW,
    assert_close,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    run_beside_torch,
    set_grads,
    step_both,
)
from torch.optim import lr_scheduler, swa_utils
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine

SHAPES = [(5,), (3, 4)]


# Every scheduler that torch has.


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=6),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 12, power=2.0),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 4, 9], 0.5),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 1 - 0.5 / (t + 1)),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 20)], [4]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, base_momentum=0.5, max_momentum=0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=16, base_momentum=0.5, max_momentum=0.9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2, factor=0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.09, anneal_epochs=5, anneal_strategy="linear"),
}


def test_every_scheduler_of_torch_is_tested() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, each in vars(module).items()
        if inspect.isclass(each) and issubclass(each, lr_scheduler.LRScheduler) and not name.endswith("LRScheduler")
    }
    assert found == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step:UserWarning")  # SequentialLR passes it
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_drives_it_as_it_drives_torch_and_resumes(backend: str, name: str, as_tensor: bool) -> None:
    params = make_params(SHAPES)
    reference = Float64AdamW([{"params": [param]} for param in params])
    plain = torch.optim.AdamW(
        [{"params": reference.params[:1]}, {"params": reference.params[1:], "lr": 0.02}], lr=0.05, foreach=False
    )
    reference.optimizer = plain

    def started(own: list[Any]) -> tuple[list[Any], FusedAdamW, Any]:
        rates: list[Any] = [torch.tensor(rate, dtype=torch.float64) if as_tensor else rate for rate in (0.05, 0.02)]
        groups = [{"params": own[:1]}, {"params": own[1:], "lr": rates[1]}]
        optimizer = FusedAdamW(groups, lr=rates[0], backend=backend)
        return rates, optimizer, SCHEDULERS[name](optimizer)

    own, theirs = copies(params), SCHEDULERS[name](plain)
    rates, optimizer, scheduler = started(own)
    betas, used = set(), {0.05}
    for step in range(14):
        if step == 7:  # a new process
            saved, of_scheduler = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
            own = copies(own)
            rates, optimizer, scheduler = started(own)
            scheduler.load_state_dict(of_scheduler)
            optimizer.load_state_dict(saved)
        betas.add(optimizer.param_groups[0]["betas"])
        grads = make_grads(params)
        set_grads(own, grads)
        set_grads(reference.params, [grad.double() for grad in grads])
        optimizer.step()
        plain.step()
        for each in (scheduler, theirs):
            each.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        expected = [group["lr"] for group in plain.param_groups]
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
        assert optimizer.param_groups[0]["betas"] == plain.param_groups[0]["betas"]
        used.add(expected[0])
    assert len(used) > 1
    assert (len(betas) > 3) == (name in ("CyclicLR", "OneCycleLR"))
    if as_tensor:
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, rates, strict=True))
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
def test_no_scheduler_overwrites_a_schedule(backend: str, name: str) -> None:
    params = make_params(SHAPES)
    optimizer, reference = run_beside_torch(params, backend, lr=Cosine(0.1, 20))
    with pytest.raises(RuntimeError, match=r"own schedule, Cosine\(.*Leave the scheduler out.*float lr"):
        SCHEDULERS[name](optimizer)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


# One GradScaler for several optimizers.


@pytest.mark.parametrize("unscales", [False, True])
def test_a_scaler_of_two_optimizers_freezes_the_one_that_overflows(backend: str, unscales: bool) -> None:
    schedules = [Cosine(0.1, 30), WSD(2, 5, 9, 0.1)]
    params = make_params([(5,), (6,)])
    optimizers = [FusedAdamW([p], lr=s, backend=backend) for p, s in zip(params, schedules, strict=True)]
    references = [Float64AdamW([p], lr=s) for p, s in zip(params, schedules, strict=True)]
    plain_params = copies(params)
    plain = [torch.optim.AdamW([p], fused=True) for p in plain_params]
    scaler, expected = (torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2))
    overflows = {1: (0,), 3: (1,), 4: (0, 1), 8: (1,)}
    for step in range(10):
        grads = make_grads(params)
        for which in overflows.get(step, ()):
            grads[which][2] = torch.inf
        for scale, both, own in ((scaler, optimizers, params), (expected, plain, plain_params)):
            for each in both:
                each.zero_grad()
            scale.scale(sum((p * g).sum() for p, g in zip(own, grads, strict=True))).backward()
            if unscales or both is plain:
                for each in both:
                    scale.unscale_(each)
            for each in both:
                scale.step(each)
            scale.update()
        for which, reference in enumerate(references):
            if which not in overflows.get(step, ()):
                reference.step([grads[which]])
        assert scaler.get_scale() == expected.get_scale()
    for optimizer, reference, schedule in zip(optimizers, references, schedules, strict=True):
        assert_same_run(optimizer, reference)
        assert int(optimizer.skipped_steps) == 10 - reference.completed > 1
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(schedule(reference.completed - 1), rel=1e-15)


def test_an_optimizer_may_be_passed_over_by_its_scaler(backend: str) -> None:
    # One of two is stepped in each round, as in the training of a GAN; the other's gradients stay scaled.
    params = make_params([(5,), (6,)])
    optimizers = [FusedAdamW([param], lr=1e-2, backend=backend) for param in params]
    references = [Float64AdamW([param], lr=1e-2) for param in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for _, which in itertools.product(range(3), range(2)):
        grads = make_grads(params)
        for each in optimizers:
            each.zero_grad()
        scaler.scale(sum((p * g).sum() for p, g in zip(params, grads, strict=True))).backward()
        scaler.step(optimizers[which])
        scaler.update()
        references[which].step([grads[which]])
    for optimizer, reference in zip(optimizers, references, strict=True):
        assert_same_run(optimizer, reference)


# Averages of models.


@pytest.mark.parametrize("average", ["swa", "ema"])
@pytest.mark.parametrize("lr", [0.01, WSD(2, 20, 5, 1e-2)], ids=["float", "schedule"])
def test_averaged_models(backend: str, average: str, lr: Any) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)).double()
    multi_avg_fn = get_ema_multi_avg_fn(0.9) if average == "ema" else None
    averaged = AveragedModel(module, multi_avg_fn=multi_avg_fn, use_buffers=average == "ema")
    params = list(module.parameters())
    optimizer, reference = FusedAdamW(params, lr=lr, backend=backend), Float64AdamW(params, lr=lr)
    data = torch.randn(24, 4, dtype=torch.float64)
    expected = [param.detach().clone() for param in reference.params]
    for count in range(6):
        optimizer.zero_grad()
        module(data).square().mean().backward()
        reference.step([param.grad for param in params])
        optimizer.step()
        averaged.update_parameters(module)
        for own, param in zip(expected, reference.params, strict=True):
            if count == 0:
                own.copy_(param.detach())
            else:
                own.lerp_(param.detach(), 0.1 if average == "ema" else 1 / (count + 1))
    assert_same_run(optimizer, reference)
    for param, own in zip(averaged.parameters(), expected, strict=True):
        assert_close(param, own, TOLERANCE[torch.float64])
    update_bn(data.split(8), averaged)
    mean = torch.stack([averaged.module[0](part).mean(0) for part in data.split(8)]).mean(0)
    assert_close(averaged.module[1].running_mean, mean, TOLERANCE[torch.float64])
    step_both(optimizer, reference)  # which the average does not disturb
    assert_same_run(optimizer, reference)
