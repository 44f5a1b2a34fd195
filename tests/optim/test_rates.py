"""Rates that a schedule drives: shown after every step, released, replaced, and edited while training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import assert_same_run, copies, make_params, run_beside_torch, same_bits, snapshot, step_both
from side_by_side import train
from torch.optim import lr_scheduler

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, Schedule


def make(backend: str = "auto", **options: Any) -> FusedAdamW:
    return FusedAdamW(make_params([(2,)]), backend=backend, **options)


def shown(optimizer: FusedAdamW) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def rows_of(optimizer: FusedAdamW) -> list[Any]:
    return [table.rows.tolist() for table in engine_of(optimizer).tables.values()]


def assert_rates(optimizer: FusedAdamW, expected: Schedule, steps: range) -> None:
    """After each of these steps, the rate is the oracle's."""
    for t in steps:
        train(optimizer, 1)
        assert shown(optimizer) == pytest.approx([expected(t)], rel=1e-14), t


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(warmup_steps=20, stable_steps=60, decay_steps=40, peak_lr=1e-3, min_lr=1e-5),
        WSD(warmup_steps=20, stable_steps=60, decay_steps=40, peak_lr=1e-3, min_lr=1e-5, decay_type="sqrt"),
        WSD(warmup_steps=20, stable_steps=None, decay_steps=40, peak_lr=1e-3, decay_type="cosine"),
        CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=16, cycle_mult=2.0, warmup_steps=10),
        CosineRestarts(peak_lr=1e-3, cycle_length=7, cycle_mult=1.1),
        Cosine(peak_lr=1e-3, total_steps=110, min_lr=1e-5, warmup_steps=11),
        Constant(0.25),
    ],
    ids=repr,
)
def test_the_group_shows_the_oracles_rate_after_every_step(backend: str, schedule: Schedule) -> None:
    options: list[dict[str, Any]] = [{}, {"lr_scale": 0.3}, {"lr_scale": 0.0}, {"lr": 0.5, "weight_decay": schedule}]
    groups = [{"params": make_params([(2,)]), **each} for each in options]
    optimizer = FusedAdamW(groups, lr=schedule, backend=backend)
    for t in range(130):
        rate = schedule(t)
        train(optimizer, 1)
        if backend in ("native", "cuda on cpu"):
            assert shown(optimizer) == [rate, 0.3 * rate, 0.0, 0.5]
            assert float(optimizer.param_groups[3]["weight_decay"]) == rate
        else:  # the cosine is another library's
            assert shown(optimizer) == pytest.approx([rate, 0.3 * rate, 0.0, 0.5], rel=1e-13, abs=1e-18)


def test_groups_that_share_a_schedule_share_no_tensor(backend: str) -> None:  # pytorch#126854
    schedule = Cosine(peak_lr=1.0, total_steps=10)
    groups = [{"params": make_params([(2,)])}, {"params": make_params([(2,)]), "lr_scale": 0.5}]
    optimizer = FusedAdamW(groups, lr=schedule, weight_decay=Constant(0.1), backend=backend)
    tensors = [group[name] for group in optimizer.param_groups for name in ("lr", "weight_decay")]
    addresses = [tensor.data_ptr() for tensor in tensors]
    assert len(set(addresses)) == 4
    train(optimizer, 1)
    assert shown(optimizer) == [1.0, 0.5]
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, 1)
    now = [group[name] for group in optimizer.param_groups for name in ("lr", "weight_decay")]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert addresses == [tensor.data_ptr() for tensor in now]
    assert {(tensor.shape, tensor.dtype) for tensor in tensors} == {(torch.Size([]), torch.float64)}
    assert optimizer.param_groups[0]["lr_schedule"] == schedule


def test_a_float_written_over_a_schedule_is_refused(backend: str) -> None:
    optimizer = make(backend, lr=Cosine(peak_lr=1.0, total_steps=10))
    train(optimizer, 1)
    group = optimizer.param_groups[0]
    output, before = group["lr"], copies(group["params"])
    for value in (0.1, torch.tensor(0.1)):
        group["lr"] = value
        with pytest.raises(RuntimeError, match=r"'lr'.* was set to .*0\.1.*Cosine.*'lr_schedule'.* = None"):
            train(optimizer, 1)
        assert same_bits(before, group["params"])
    group["lr"] = output
    assert_rates(optimizer, Cosine(peak_lr=1.0, total_steps=10), range(1, 2))


def test_a_scheduled_rate_changed_in_place_is_refused(backend: str) -> None:
    params, schedule = make_params([(3,)]), Cosine(peak_lr=0.1, total_steps=20, min_lr=0.01)
    optimizer, reference = run_beside_torch(params, backend, lr=schedule, weight_decay=schedule)
    group, before = optimizer.param_groups[0], snapshot(optimizer)
    for name in ("lr", "weight_decay"):
        value = float(group[name])
        group[name] *= 0.1
        words = rf"group\['{name}'\] was written in place .*{name}_schedule'\] = None"
        with pytest.raises(RuntimeError, match=words):
            train(optimizer, 1)
        group[name].fill_(value)
        group[f"{name}_schedule"] = group[f"{name}_schedule"]  # no remedy
        with pytest.raises(RuntimeError, match="was written in place"):
            train(optimizer, 1)
        group[name] = schedule  # assigned anew, it goes on from the same count
    assert same_bits(before, snapshot(optimizer))
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
    count = int(optimizer.state[params[0]]["step"])
    group["lr_schedule"] = None
    group["lr"] *= 0.1
    before_last = float(group["lr"])
    train(optimizer, 1)
    assert float(group["lr"]) == before_last == pytest.approx(0.1 * schedule(count - 1), rel=1e-12)


@pytest.mark.parametrize("with_a_float", [True, False])
def test_a_schedule_is_released(backend: str, with_a_float: bool) -> None:
    schedule = Cosine(peak_lr=1.0, total_steps=10)
    optimizer = make(backend, lr=schedule)
    group = optimizer.param_groups[0]
    train(optimizer, 4)
    group["lr_schedule"] = None
    if with_a_float:
        group["lr"] = 0.25
    assert_rates(optimizer, Constant(0.25 if with_a_float else schedule(3)), range(3))
    lr_scheduler.StepLR(optimizer, 1)  # takes a torch scheduler now
    group["lr"] = Cosine(peak_lr=2.0, total_steps=10)  # and a schedule again, at the optimizer's own count
    assert_rates(optimizer, Cosine(peak_lr=2.0, total_steps=10), range(7, 8))


def test_a_schedule_is_replaced_by_another(backend: str) -> None:
    first, second = (
        Cosine(peak_lr=1.0, total_steps=100),
        WSD(warmup_steps=3, stable_steps=10, decay_steps=7, peak_lr=0.5),
    )
    params = make_params([(2,), (3,)])
    optimizer, reference = run_beside_torch(params, backend, steps=5, lr=first, weight_decay=0.1)
    (group,), (expected,) = optimizer.param_groups, reference.optimizer.param_groups
    group["lr"] = reference.scheduler.lr_lambdas[0] = second
    expected["lr"] = second(5)
    for t in range(5, 12):
        if t == 8:
            group["weight_decay"] = Constant(0.3)
            expected["weight_decay"] = 0.3
        step_both(optimizer, reference, steps=1)
        assert shown(optimizer) == pytest.approx([second(t)], rel=1e-15)
    assert_same_run(optimizer, reference)


def test_lr_scale_changed_while_training(backend: str) -> None:
    optimizer = make(backend, lr=Constant(1.0))
    for scale in (1.0, 0.5, 0.0, 3.0):
        optimizer.param_groups[0]["lr_scale"] = scale
        assert_rates(optimizer, Constant(scale), range(1))


# begin_decay and extend_stable: the rates are those of the schedule that the oracle makes of it.

BASE = {"peak_lr": 1e-2, "min_lr": 1e-3}
EVENTS: dict[str, tuple[WSD, int]] = {
    "open-ended": (WSD(warmup_steps=10, stable_steps=None, decay_steps=8, **BASE), 30),
    "first stable step": (WSD(warmup_steps=10, stable_steps=None, decay_steps=8, **BASE, decay_type="sqrt"), 10),
    "warm-up of an open-ended one": (
        WSD(warmup_steps=10, stable_steps=None, decay_steps=8, **BASE, decay_type="cosine"),
        4,
    ),
    "stable": (WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE), 15),
    "warm-up": (WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE, decay_type="cosine"), 7),
    "the very beginning": (WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE), 0),
    "first decay step": (WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE), 30),
    "decay": (WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE), 34),
    "done": (WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE), 45),
    "the beginning without warm-up": (WSD(warmup_steps=0, stable_steps=20, decay_steps=8, **BASE), 0),
}


@pytest.mark.parametrize(("schedule", "at"), EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("again", [False, True])
def test_begin_decay_equals_the_oracle(backend: str, schedule: WSD, at: int, again: bool) -> None:
    optimizer, expected = make(backend, lr=schedule), schedule.begin_decay(at)
    assert_rates(optimizer, schedule, range(at))
    optimizer.begin_decay()
    assert_rates(optimizer, expected, range(at, at + 3))
    if again:
        optimizer.begin_decay()  # one that has begun goes on
    assert_rates(optimizer, expected, range(at + 3, 60))


@pytest.mark.parametrize("at", [0, 5, 10, 20, 29, 30, 34, 45])
@pytest.mark.parametrize("n", [0, 1, 13])
def test_extend_stable_equals_the_oracle(backend: str, at: int, n: int) -> None:
    schedule = WSD(warmup_steps=10, stable_steps=20, decay_steps=8, **BASE)
    optimizer = make(backend, lr=schedule)
    assert_rates(optimizer, schedule, range(at))
    optimizer.extend_stable(n)
    is_late = schedule.phase(at) in ("decay", "done")
    assert_rates(optimizer, schedule if is_late else schedule.extend_stable(n), range(at, 60))


def test_a_refused_extension_changes_no_group_and_an_end_all(backend: str) -> None:
    schedule, of_decay = (
        WSD(warmup_steps=2, stable_steps=5, decay_steps=4, **BASE),
        WSD(warmup_steps=0, stable_steps=None, decay_steps=6, peak_lr=1.0),
    )
    options: list[dict[str, Any]] = [{}, {"lr_scale": 0.5}, {"lr": 0.1, "weight_decay": of_decay}]
    groups = [{"params": make_params([(2,)]), **each} for each in options]
    optimizer = FusedAdamW(groups, lr=schedule, backend=backend)
    train(optimizer, 3)
    before = rows_of(optimizer)
    with pytest.raises(ValueError, match="open-ended"):
        optimizer.extend_stable(10)
    assert before == rows_of(optimizer)
    optimizer.begin_decay()
    expected, decay = schedule.begin_decay(3), of_decay.begin_decay(3)
    for t in range(3, 15):
        train(optimizer, 1)
        assert shown(optimizer) == pytest.approx([expected(t), 0.5 * expected(t), 0.1])
        assert float(optimizer.param_groups[2]["weight_decay"]) == pytest.approx(decay(t))


@pytest.mark.parametrize("lr", [0.1, Cosine(peak_lr=1.0, total_steps=10), Constant(1.0)])
def test_without_a_wsd_there_is_nothing_to_decay(lr: Any) -> None:
    optimizer = make(lr=lr)
    for call in (optimizer.begin_decay, lambda: optimizer.extend_stable(1)):
        with pytest.raises(RuntimeError, match="no parameter group has a WSD schedule"):
            call()


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)])
def test_extend_stable_takes_a_count(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n must be an int from 0"):
        make(lr=WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0)).extend_stable(n)
