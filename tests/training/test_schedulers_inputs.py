"""What the schedulers refuse, and what an error leaves behind: nothing."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine
from nexus.training.schedulers import CosineAnnealingScheduler, CosineRestartScheduler, WSDScheduler

WSD_ARGS = {"warmup_steps": 3, "stable_steps": 5, "decay_steps": 6, "peak_lr": 1e-2, "min_lr": 1e-4}
SCHEDULERS: list[Callable[[Optimizer], LRScheduler]] = [
    lambda optimizer: WSDScheduler(optimizer, **WSD_ARGS),
    lambda optimizer: CosineRestartScheduler(optimizer, peak_lr=1.0),
    lambda optimizer: CosineAnnealingScheduler(optimizer, 2, 9, peak_lr=1.0),
    lambda optimizer: CosineAnnealingScheduler(optimizer, 2, 9),
]
NAN = math.nan

both = pytest.mark.parametrize("kind", [AdamW, FusedAdamW])


def make(kind: Callable[..., Optimizer], lr: Any = 0.5) -> Optimizer:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return kind([parameter], lr=lr)


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def used_rates(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    used = []
    for _ in range(steps):
        used += rates(optimizer)
        optimizer.step()
        scheduler.step()
    return used


def test_two_drivers_are_refused() -> None:
    optimizer = make(FusedAdamW)
    SCHEDULERS[0](optimizer)

    def still_refused() -> None:
        with pytest.raises(RuntimeError, match=r"WSDScheduler drives this.*Attach one of the two alone"):
            LambdaLR(optimizer, lambda step: 1.0)

    still_refused()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    for wrong, error in ((5, KeyError), (-2, ValueError)):
        with pytest.raises(error):
            CosineRestartScheduler(optimizer, 1.0, last_epoch=wrong)
        still_refused()


@pytest.mark.parametrize("attach", [*SCHEDULERS, lambda optimizer: LambdaLR(optimizer, lambda step: 1.0)])
def test_an_optimizer_with_its_own_schedule_takes_no_other(attach: Callable[[Optimizer], LRScheduler]) -> None:
    schedule = Cosine(1.0, 9)
    optimizer = make(FusedAdamW, lr=schedule)
    with pytest.raises(RuntimeError, match=r"evaluates its own schedule.*Leave the scheduler out, or give"):
        attach(optimizer)
    optimizer.step()
    optimizer.step()
    assert rates(optimizer) == [schedule(1)]


@pytest.mark.parametrize("attach", SCHEDULERS)
def test_a_schedule_that_was_assigned_takes_no_other(attach: Callable[[Optimizer], LRScheduler]) -> None:
    optimizer = make(FusedAdamW)
    optimizer.param_groups[0]["lr"] = Cosine(1.0, 9)
    with pytest.raises(RuntimeError, match="evaluates its own schedule"):
        attach(optimizer)


@pytest.mark.parametrize("optimizer_first", [True, False])
@both
def test_warnings_are_torchs(kind: Callable[..., Optimizer], optimizer_first: bool) -> None:
    def messages(attach: Callable[[Optimizer], LRScheduler]) -> list[tuple[type[Warning], str]]:
        optimizer = make(kind)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scheduler = attach(optimizer)
            if optimizer_first:
                optimizer.step()
            scheduler.step()
            scheduler.step()
            scheduler.step(7)
        return [(warning.category, str(warning.message)) for warning in caught]

    expected = messages(lambda optimizer: LambdaLR(optimizer, lambda step: 1.0))
    assert len(expected) == (1 if optimizer_first else 2)
    assert all(messages(attach) == expected for attach in SCHEDULERS)


@both
def test_an_edit_that_fails_changes_nothing(kind: Callable[..., Optimizer]) -> None:
    optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **{**WSD_ARGS, "min_lr": 0.0})
    with pytest.raises(ValueError, match="nothing to decay from"):
        scheduler.begin_decay()
    for wrong in (-1, 1.5, None):
        with pytest.raises((TypeError, ValueError), match="n must be an int"):
            scheduler.extend_stable(wrong)  # type: ignore[arg-type]
    assert used_rates(optimizer, scheduler, 20) == WSD(3, 5, 6, 1e-2).values(0, 20)

    open_ended = WSDScheduler(make(kind), **{**WSD_ARGS, "stable_steps": None})
    with pytest.raises(ValueError, match="no end to extend"):
        open_ended.extend_stable(4)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "named"),
    [
        *((WSDScheduler, {name: wrong}, name) for name in WSD_ARGS for wrong in (-1, "3")),
        (WSDScheduler, {"decay_steps": 0}, "decay_steps"),
        (WSDScheduler, {"min_lr": 1.0}, "min_lr"),
        (WSDScheduler, {"decay_type": "quadratic"}, "decay_type"),
        (CosineRestartScheduler, {"peak_lr": 0.0}, "peak_lr"),
        (CosineRestartScheduler, {"peak_lr": 1.0, "cycle_length": 0}, "cycle_length"),
        (CosineRestartScheduler, {"peak_lr": 1.0, "cycle_mult": 0.5}, "cycle_mult"),
        (CosineRestartScheduler, {"peak_lr": 1.0, "warmup_steps": 1.5}, "warmup_steps"),
        (CosineAnnealingScheduler, {"warmup_steps": 8, "max_steps": 8}, "warmup_steps must be less than max_steps=8"),
        (CosineAnnealingScheduler, {"warmup_steps": 0, "max_steps": 0}, "max_steps"),
        (CosineAnnealingScheduler, {"warmup_steps": 0, "max_steps": 9, "peak_lr": math.inf}, "peak_lr"),
        *((WSDScheduler, {"last_epoch": wrong}, "last_epoch") for wrong in (-2, 1.5, True, None)),
        *((WSDScheduler, {"optimizer": wrong}, "optimizer") for wrong in (None, nn.Linear(1, 1))),
    ],
)
def test_bad_arguments(scheduler: Callable[..., LRScheduler], arguments: dict[str, Any], named: str) -> None:
    for kind in (AdamW, FusedAdamW):
        optimizer = make(kind)
        defaults = {"optimizer": optimizer, **(WSD_ARGS if scheduler is WSDScheduler else {})}
        with pytest.raises((TypeError, ValueError), match=rf"^{named}\b.*got"):
            scheduler(**{**defaults, **arguments})
        assert rates(optimizer) == [0.5]
        assert "initial_lr" not in optimizer.param_groups[0]


@both
def test_a_bad_scale_is_named(kind: Callable[..., Optimizer]) -> None:
    optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    optimizer.step()
    optimizer.param_groups[0]["lr_scale"] = NAN
    with pytest.raises(ValueError, match="lr_scale must be a finite number"):
        scheduler.step()


@both
def test_a_bad_state_changes_nothing(kind: Callable[..., Optimizer]) -> None:
    optimizer = make(kind)
    scheduler = WSDScheduler(optimizer, **WSD_ARGS)
    used_rates(optimizer, scheduler, 4)
    state = scheduler.state_dict()
    for wrong in (
        None,
        {},
        {**state, "last_epoch": -1},
        {**state, "last_epoch": 2.5},
        {**state, "schedule": None},
        {**state, "schedule": {**state["schedule"], "decay_steps": 0}},
        {**state, "schedule": Cosine(1.0, 9).to_dict()},
        LambdaLR(make(AdamW), lambda step: 1.0).state_dict(),
    ):
        with pytest.raises((TypeError, ValueError)):
            scheduler.load_state_dict(wrong)  # type: ignore[arg-type]
        assert scheduler.state_dict() == state
    assert used_rates(optimizer, scheduler, 12) == WSD(3, 5, 6, 1e-2, 1e-4).values(4, 16)


@both
def test_last_epoch_needs_a_loaded_optimizer(kind: Callable[..., Optimizer]) -> None:
    with pytest.raises(KeyError, match="initial_lr"):
        WSDScheduler(make(kind), **WSD_ARGS, last_epoch=5)
