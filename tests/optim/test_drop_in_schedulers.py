"""torch's schedulers, all that there are, and its scalers around a FusedAdamW, as torch has them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, copies, make_grads, make_params, run_beside_torch, step_both
from side_by_side import params_of
from torch.optim import lr_scheduler, swa_utils

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
    def started(own: list[Any], rates: list[Any]) -> tuple[FusedAdamW, Any]:
        groups = [{"params": own[:1], "lr": rates[0]}, {"params": own[1:], "lr": rates[1]}]
        optimizer = FusedAdamW(groups, backend=backend)
        return optimizer, SCHEDULERS[name](optimizer)

    def rates() -> list[Any]:
        return [torch.tensor(rate, dtype=torch.float64) if as_tensor else rate for rate in (0.05, 0.02)]

    params, given = make_params(SHAPES), rates()
    reference = Float64AdamW([{"params": params[:1], "lr": 0.05}, {"params": params[1:], "lr": 0.02}])
    plain = reference.optimizer
    theirs = SCHEDULERS[name](plain)
    optimizer, scheduler = started(params, given)
    betas, used = set(), {0.05}
    for step in range(14):
        if step == 7:  # a new process
            saved, of_scheduler = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(scheduler.state_dict())
            given = rates()
            optimizer, scheduler = started(copies(params), given)
            scheduler.load_state_dict(of_scheduler)
            optimizer.load_state_dict(saved)
        betas.add(optimizer.param_groups[0]["betas"])
        step_both(optimizer, reference, steps=1)
        for each in (scheduler, theirs):
            each.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        expected = [group["lr"] for group in plain.param_groups]
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(expected, rel=1e-12)
        assert optimizer.param_groups[0]["betas"] == plain.param_groups[0]["betas"]
        used.add(expected[0])
    assert len(used) > 1
    assert (len(betas) > 3) == (name in ("CyclicLR", "OneCycleLR"))
    if as_tensor:
        assert all(group["lr"] is rate for group, rate in zip(optimizer.param_groups, given, strict=True))
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ReduceLROnPlateau"])
def test_no_scheduler_overwrites_a_schedule(backend: str, name: str) -> None:
    optimizer, reference = run_beside_torch(make_params(SHAPES), backend, lr=Cosine(peak_lr=0.1, total_steps=20))
    with pytest.raises(RuntimeError, match=r"own schedule, Cosine\(.*Leave the scheduler out.*float lr"):
        SCHEDULERS[name](optimizer)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


# One GradScaler for several optimizers.


@pytest.mark.parametrize("unscales", [False, True])
def test_a_scaler_of_two_optimizers_freezes_the_one_that_overflows(backend: str, unscales: bool) -> None:
    """In some steps one is passed over, as in the training of a GAN, and its gradients stay scaled."""
    schedules, params = (
        [Cosine(peak_lr=0.1, total_steps=30), WSD(warmup_steps=2, stable_steps=5, decay_steps=9, peak_lr=0.1)],
        make_params([(5,), (6,)]),
    )
    plain: list[Any] = [torch.optim.AdamW([param], fused=True) for param in copies(params)]
    pairs = [run_beside_torch([param], backend, steps=0, lr=lr) for param, lr in zip(params, schedules, strict=True)]
    scaler, expected = (torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2))
    overflows, passed_over = {1: (0,), 3: (1,), 4: (0, 1), 8: (1,)}, {2: 0, 6: 1}
    for step in range(10):
        spoiled, grads = overflows.get(step, ()), make_grads(params)
        for which in spoiled:
            grads[which][2] = torch.inf
        for each_scaler, both in ((scaler, [optimizer for optimizer, _ in pairs]), (expected, plain)):
            for each in both:
                each.zero_grad()
            losses = [(params_of(each)[0] * grad).sum() for each, grad in zip(both, grads, strict=True)]
            each_scaler.scale(sum(losses)).backward()
            stepped = [each for which, each in enumerate(both) if which != passed_over.get(step)]
            if unscales or both is plain:
                for each in stepped:
                    each_scaler.unscale_(each)
            for each in stepped:
                each_scaler.step(each)
            each_scaler.update()
        for which, (_, reference) in enumerate(pairs):
            if which not in spoiled and which != passed_over.get(step):
                reference.step([grads[which]])
        assert scaler.get_scale() == expected.get_scale()
    for (optimizer, reference), schedule in zip(pairs, schedules, strict=True):
        assert_same_run(optimizer, reference)
        assert int(optimizer.skipped_steps) == 9 - reference.completed > 1
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(schedule(reference.completed - 1), rel=1e-15)
