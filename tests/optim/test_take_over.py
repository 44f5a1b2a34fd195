"""Schedules of torch's schedulers, computed on the device from where the scheduler stands."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import BACKENDS, make_grads, make_params, set_grads
from torch.optim import lr_scheduler

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Schedule, betas_from_torch, from_torch, join
from nexus.schedules.imports import ImportMismatch

RATES = (1e-2, 3e-3)
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 1e-4),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [1e-2, 2e-2], total_steps=30, cycle_momentum=False),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0 / (1.0 + t)),
}


def groups() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    params = make_params([(3, 5), (7,), (40,), (2, 3)])
    return [{"params": params[:2], "lr": RATES[0]}, {"params": params[2:], "lr": RATES[1]}]


def run(optimizer: Any, steps: int, scheduler: Any = None) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(steps):
        torch.manual_seed(step)
        set_grads(params, make_grads(params))
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("done", [0, 5])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_parameters_go_on_as_under_the_scheduler(name: str, done: int, backend: str) -> None:
    scheduled, taken = FusedAdamW(groups(), backend=backend), FusedAdamW(groups(), backend=backend)
    real, theirs = (SCHEDULERS[name](optimizer) for optimizer in (scheduled, taken))
    run(scheduled, done, real)
    run(taken, done, theirs)
    before = [param.detach().clone() for group in taken.param_groups for param in group["params"]]
    steps = 20 if name == "lambda" else None
    schedules = taken.take_over(theirs, steps=steps)
    assert schedules == from_torch(real, steps=steps)
    run(scheduled, 12, real)
    run(taken, 12)
    used = [float(group["lr"]) for group in taken.param_groups]
    assert used == pytest.approx([schedule(done + 11) for schedule in schedules], rel=1e-12)
    for ours, other in zip(taken.param_groups, scheduled.param_groups, strict=True):
        for a, b in zip(ours["params"], other["params"], strict=True):
            # Their rates may differ in the last bit of float64, which float32 rounds away but for rare ties.
            torch.testing.assert_close(a, b, rtol=2e-7, atol=1e-9)
    after = [param for group in taken.param_groups for param in group["params"]]
    assert all((new - old).abs().max() > 1e-4 for new, old in zip(after, before, strict=True))


def test_the_count_is_the_schedulers() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.StepLR(optimizer, 3, 0.5)
    run(optimizer, 2)
    for _ in range(4):
        scheduler.step()
    optimizer.take_over(scheduler)
    run(optimizer, 1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5 * rate for rate in RATES]


def test_a_chain_has_the_count_of_its_parts() -> None:
    optimizer = FusedAdamW(groups())
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=8), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    chain = lr_scheduler.ChainedScheduler(parts)
    run(optimizer, 3, chain)
    schedules = optimizer.take_over(chain)
    run(optimizer, 2)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [schedule(4) for schedule in schedules]


def test_a_group_whose_rate_was_changed_is_refused() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    run(optimizer, 3, scheduler)
    optimizer.param_groups[1]["lr"] *= 0.5
    with pytest.raises(ImportMismatch, match="at step 3, group 1, the optimizer of the CosineAnnealingLR"):
        optimizer.take_over(scheduler)


@pytest.mark.parametrize("compose", [lambda s: s.warmup(2), lambda s: s * Constant(0.5), lambda s: join([s], [])])
def test_a_wsd_within_another_schedule_is_not_edited(compose: Callable[[Schedule], Schedule]) -> None:
    whole = WSD(warmup_steps=2, stable_steps=4, decay_steps=4, peak_lr=1e-3)
    params = [group["params"] for group in groups()]
    optimizer = FusedAdamW([{"params": params[0], "lr": whole}, {"params": params[1], "lr": compose(whole)}])
    run(optimizer, 3)
    for edit in (optimizer.begin_decay, lambda: optimizer.extend_stable(2)):
        with pytest.raises(RuntimeError, match="a WSD that is part of another schedule cannot be edited"):
            edit()


@pytest.mark.parametrize("done", [0, 1])
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "lambda"])
def test_a_scheduler_that_is_stepped_on_is_refused_by_name(name: str, done: int) -> None:
    optimizer = FusedAdamW(groups())
    scheduler = SCHEDULERS[name](optimizer)
    run(optimizer, 1, scheduler)
    optimizer.take_over(scheduler)
    run(optimizer, done)
    scheduler.step()
    words = rf"drives it, .* take_over made this schedule of the {type(scheduler).__name__}: leave out the step\(\)"
    with pytest.raises(RuntimeError, match=words):
        run(optimizer, 1)


def test_a_rate_that_is_assigned_afterwards_is_refused_with_the_schedulers_name() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.take_over(scheduler)
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(RuntimeError, match=r"was set to 0.001 .* take_over made this schedule of the ExponentialLR"):
        run(optimizer, 1)


def test_the_rate_of_the_next_update_is_shown_at_once() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(optimizer, 2, scheduler)
    optimizer.take_over(scheduler)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25 * rate for rate in RATES]


def test_a_second_take_over_does_not_set_the_run_back() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.StepLR(optimizer, 30, 0.5)
    run(optimizer, 2, scheduler)
    schedules = optimizer.take_over(scheduler)
    for steps in (0, 29):
        run(optimizer, steps)
        with pytest.raises(ValueError, match=r"of this StepLR in force already, .* back to 2, .* the second call"):
            optimizer.take_over(scheduler)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [schedule(30) for schedule in schedules]


def test_a_scheduler_that_drives_the_rates_again_is_taken_over_again() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    schedules = optimizer.take_over(scheduler)
    run(optimizer, 3)
    for group, rate in zip(optimizer.param_groups, RATES, strict=True):
        group.update(lr=rate, lr_schedule=None)
    run(optimizer, 1, scheduler)
    assert optimizer.take_over(scheduler) == schedules
    run(optimizer, 1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5 * rate for rate in RATES]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda o: None, "scheduler must be one of torch's over this optimizer, got None"),
        (lambda o: Constant(1.0), "scheduler must be one of torch's over this optimizer, got Constant"),
        (lambda o: lr_scheduler.StepLR(FusedAdamW(groups()), 3), "over this optimizer, got .*StepLR"),
        (lambda o: lr_scheduler.ReduceLROnPlateau(FusedAdamW(groups())), "over this optimizer, got .*ReduceLROnPl"),
        (lambda o: lr_scheduler.ReduceLROnPlateau(o, threshold=-0.1), "threshold must be a finite number >= 0"),
        (lambda o: lr_scheduler.LambdaLR(o, lambda t: 1.0), "steps="),
    ],
)
def test_what_cannot_be_taken_over_changes_nothing(make: Callable[[Any], Any], words: str) -> None:
    optimizer = FusedAdamW(groups())
    with pytest.raises((ValueError, TypeError), match=words):
        optimizer.take_over(make(optimizer))
    run(optimizer, 1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == list(RATES)
    assert not any(isinstance(group.get("lr_schedule"), Schedule) for group in optimizer.param_groups)


def one_cycle(optimizer: Any) -> Any:
    return lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=40, base_momentum=[0.6, 0.85])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("done", [0, 5])
def test_the_betas_go_on_as_in_torch(done: int, backend: str) -> None:
    """As in torch's own AdamW, with its form of the bias correction."""
    theirs, taken = (
        kind([{"params": each["params"], "lr": each["lr"]} for each in groups()], **options)
        for kind, options in (
            (torch.optim.AdamW, {}),
            (FusedAdamW, {"backend": backend, "bias_correction": "power"}),
        )
    )
    real, mine = one_cycle(theirs), one_cycle(taken)
    run(theirs, done, real)
    run(taken, done, mine)
    taken.take_over(mine)
    assert [group["betas"] for group in taken.param_groups] == betas_from_torch(real)
    run(theirs, 24, real)
    run(taken, 24)
    for ours, other in zip(taken.param_groups, theirs.param_groups, strict=True):
        for a, b in zip(ours["params"], other["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)
    saved = [group["betas"] for group in taken.state_dict()["param_groups"]]
    assert saved == [pytest.approx(group["betas"], rel=1e-11) for group in theirs.param_groups]


def test_betas_that_reach_1_are_not_taken_over() -> None:
    optimizer = FusedAdamW(groups())
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20, max_momentum=1.0 - 2**-60)
    before = [dict(group) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=r"betas\[0\] must"):
        optimizer.take_over(scheduler)
    assert [dict(group) for group in optimizer.param_groups] == before
