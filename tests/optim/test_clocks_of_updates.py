"""What else can be done with schedules, at a clock that counts updates: the bits are those of a run without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from clock_cases import BY_UPDATES
from references import make_params, params_of, same_bits, snapshot, through_a_file
from side_by_side import train

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Clock, Cosine, Linear, ReduceOnPlateau, Schedule

PLATEAU = ReduceOnPlateau(WSD(warmup_steps=3, stable_steps=4, decay_steps=6, peak_lr=1e-2), factor=0.5, patience=1)
DRIVEN: dict[str, dict[str, Any]] = {
    "weight decay": {"lr": BY_UPDATES, "weight_decay": Linear(start_lr=1.0, end_lr=0.0, total_steps=9)},
    "plateau": {"lr": PLATEAU},
}


def at(clock: Clock, value: Any) -> Any:
    """Every schedule of a setting, at the clock."""
    if isinstance(value, tuple):
        return tuple(at(clock, each) for each in value)
    return value.at(clock) if isinstance(value, Schedule) else value


def pair(backend: str, options: dict[str, Any]) -> tuple[FusedAdamW, FusedAdamW, Clock]:
    """Without a clock, and at one."""
    clock, made = Clock(), []
    for settings in (options, {name: at(clock, value) for name, value in options.items()}):
        torch.manual_seed(0)
        made.append(FusedAdamW([{"params": make_params([(5,), (3, 2)]), **settings}], backend=backend))
    return made[0], made[1], clock


def run_both(
    plain: FusedAdamW, clocked: FusedAdamW, clock: Clock, steps: range, act: Callable[[int, FusedAdamW], Any]
) -> None:
    for t in steps:
        for optimizer in (plain, clocked):
            torch.manual_seed(t)
            act(t, optimizer)
            train(optimizer, 1)
        clocked.advance(clock, 1)
    assert same_bits(snapshot(clocked), snapshot(plain))


def resumed(options: dict[str, Any], *optimizers: FusedAdamW) -> tuple[FusedAdamW, FusedAdamW, Clock]:
    """New ones, which go on from the state dicts of these."""
    plain, clocked, clock = pair(optimizers[0].backend, options)
    for new, old in zip((plain, clocked), optimizers, strict=True):
        with torch.no_grad():
            for param, value in zip(params_of(new), params_of(old), strict=True):
                param.copy_(value)
        new.load_state_dict(through_a_file(old.state_dict()))
    return plain, clocked, clock


@pytest.mark.parametrize("options", DRIVEN.values(), ids=DRIVEN)
def test_any_setting_may_follow_a_clock(backend: str, options: dict[str, Any]) -> None:
    def hear(t: int, optimizer: FusedAdamW) -> None:
        if options["lr"] is PLATEAU:
            optimizer.report(1.0 + t % 3)

    plain, clocked, clock = pair(backend, options)
    run_both(plain, clocked, clock, range(6), hear)
    if options["lr"] is PLATEAU:
        assert float(clocked.param_groups[0]["lr"]) < PLATEAU(5)
    run_both(*resumed(options, plain, clocked), range(6, 12), hear)
    run_both(plain, clocked, clock, range(6, 12), hear)


@pytest.mark.parametrize(
    "inner", [WSD(warmup_steps=2, stable_steps=None, decay_steps=4, peak_lr=1e-2), PLATEAU], ids=["WSD", "plateau"]
)
def test_edits_are_made_at_the_count_of_the_clock(backend: str, inner: Schedule) -> None:
    def edit(t: int, optimizer: FusedAdamW) -> None:
        edits = {
            3: optimizer.hold,
            5: lambda: optimizer.rewarm(3),
            8: lambda: optimizer.replace(Cosine(peak_lr=2e-2, total_steps=9)),
            12: lambda: optimizer.begin_decay(4, kind="sqrt"),
        }
        edits.get(t, lambda: None)()
        if inner is PLATEAU:
            optimizer.report(1.0 + t % 3)

    options = {"lr": inner}
    plain, clocked, clock = pair(backend, options)
    run_both(plain, clocked, clock, range(10), edit)
    assert clocked.schedule == plain.schedule.at(clock)
    run_both(*resumed(options, plain, clocked), range(10, 18), edit)
    run_both(plain, clocked, clock, range(10, 18), edit)
    assert clocked.schedules == [plain.schedule.at(clock)]
    assert float(clocked.param_groups[0]["lr"]) == 0.0


def test_a_plateau_comes_to_a_clock_and_not_the_other_way_round() -> None:
    line = Linear(start_lr=0.0, end_lr=1.0, total_steps=1000)
    with pytest.raises(TypeError, match="schedule must be at no clock"):
        ReduceOnPlateau(line.at(Clock()))
    optimizer = FusedAdamW(make_params([(2,)]), lr=line)
    with pytest.raises(TypeError, match="schedule must be at no clock"):
        optimizer.replace(line.at(Clock()))
