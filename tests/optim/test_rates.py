"""Rates: scheduled, given as tensors, driven by torch's schedulers, and changed by hand while training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch.optim import lr_scheduler

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, Schedule


def step(optimizer: FusedAdamW) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_grads(params, make_grads(params))
    optimizer.step()


def shown(optimizer: FusedAdamW, name: str = "lr") -> list[float]:
    return [float(group[name]) for group in optimizer.param_groups]


# Schedules.


@pytest.mark.parametrize(
    "schedule",
    [
        WSD(20, 60, 40, 1e-3, 1e-5),
        WSD(20, 60, 40, 1e-3, 1e-5, "sqrt"),
        WSD(20, None, 40, 1e-3, decay_type="cosine"),
        CosineRestarts(1e-3, 1e-6, 16, 2.0, 10),
        CosineRestarts(1e-3, cycle_length=7, cycle_mult=1.1),
        Cosine(1e-3, 110, 1e-5, 11),
        Constant(0.25),
    ],
    ids=repr,
)
def test_the_group_shows_the_oracles_rate_after_every_step(backend: str, schedule: Schedule) -> None:
    groups = [
        {"params": make_params([(2,)])},
        {"params": make_params([(2,)]), "lr_scale": 0.3},
        {"params": make_params([(2,)]), "lr_scale": 0.0},
        {"params": make_params([(2,)]), "lr": 0.5, "weight_decay": schedule},
    ]
    optimizer = FusedAdamW(groups, lr=schedule, backend=backend)
    for t in range(130):
        rate = schedule(t)
        step(optimizer)
        if backend in ("native", "cuda on cpu"):
            assert shown(optimizer) == [rate, 0.3 * rate, 0.0, 0.5]
            assert float(optimizer.param_groups[3]["weight_decay"]) == rate
        else:  # the cosine is another library's
            assert shown(optimizer) == pytest.approx([rate, 0.3 * rate, 0.0, 0.5], rel=1e-13, abs=1e-18)


def test_a_schedules_tensor_is_never_replaced(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(2,)]), lr=Cosine(1.0, 10), weight_decay=Constant(0.1), backend=backend)
    tensors = [optimizer.param_groups[0][name] for name in ("lr", "weight_decay")]
    addresses = [tensor.data_ptr() for tensor in tensors]
    step(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    step(optimizer)
    now = [optimizer.param_groups[0][name] for name in ("lr", "weight_decay")]
    assert all(a is b for a, b in zip(tensors, now, strict=True))
    assert addresses == [tensor.data_ptr() for tensor in now]
    assert tensors[0].shape == ()
    assert tensors[0].dtype == torch.float64
    assert optimizer.param_groups[0]["lr_schedule"] == Cosine(1.0, 10)


def test_groups_that_share_a_schedule_share_no_tensor(backend: str) -> None:  # pytorch#126854
    schedule = Cosine(1.0, 10)
    groups = [{"params": make_params([(2,)])}, {"params": make_params([(2,)]), "lr_scale": 0.5}]
    optimizer = FusedAdamW(groups, lr=schedule, backend=backend)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert first is not second
    assert first.data_ptr() != second.data_ptr()
    step(optimizer)
    assert shown(optimizer) == [1.0, 0.5]


def test_a_float_written_over_a_schedule_is_refused(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(2,)]), lr=Cosine(1.0, 10), backend=backend)
    step(optimizer)
    output = optimizer.param_groups[0]["lr"]
    for value in (0.1, torch.tensor(0.1)):
        optimizer.param_groups[0]["lr"] = value
        before = optimizer.param_groups[0]["params"][0].detach().clone()
        with pytest.raises(RuntimeError, match=r"'lr'.* was set to .*0\.1.*Cosine.*'lr_schedule'.* = None"):
            step(optimizer)
        assert torch.equal(before, optimizer.param_groups[0]["params"][0])
    optimizer.param_groups[0]["lr"] = output
    step(optimizer)
    assert shown(optimizer) == [Cosine(1.0, 10)(1)]


def test_a_scheduled_rate_changed_in_place_is_refused(backend: str) -> None:
    params = make_params([(3,)])
    schedule = Cosine(0.1, 20, 0.01)
    optimizer = FusedAdamW(params, lr=schedule, weight_decay=schedule, backend=backend)
    reference = Float64AdamW(params, lr=schedule, weight_decay=schedule)
    step_both(optimizer, reference)
    group, before = optimizer.param_groups[0], snapshot(optimizer)
    for name in ("lr", "weight_decay"):
        shown = float(group[name])
        group[name] *= 0.1
        with pytest.raises(
            RuntimeError, match=rf"group\['{name}'\] was written in place .*{name}_schedule'\] = None"
        ):
            step(optimizer)
        group[name].fill_(shown)
        group[f"{name}_schedule"] = group[f"{name}_schedule"]  # no remedy
        with pytest.raises(RuntimeError, match="was written in place"):
            step(optimizer)
        group[name] = schedule  # assigned anew, it goes on from the same count
    assert same_bits(before, snapshot(optimizer))
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
    count = int(optimizer.state[params[0]]["step"])
    group["lr_schedule"] = None
    group["lr"] *= 0.1
    before_last = float(group["lr"])
    step(optimizer)
    assert float(group["lr"]) == before_last == pytest.approx(0.1 * schedule(count - 1), rel=1e-12)


@pytest.mark.parametrize("with_a_float", [True, False])
def test_a_schedule_is_released(backend: str, with_a_float: bool) -> None:
    optimizer = FusedAdamW(make_params([(2,)]), lr=Cosine(1.0, 10), backend=backend)
    group = optimizer.param_groups[0]
    for _ in range(4):
        step(optimizer)
    group["lr_schedule"] = None
    if with_a_float:
        group["lr"] = 0.25
    held = Cosine(1.0, 10)(3)
    for _ in range(3):
        step(optimizer)
        assert shown(optimizer) == pytest.approx([0.25 if with_a_float else held], rel=1e-15)
    lr_scheduler.StepLR(optimizer, 1)  # takes a torch scheduler now
    group["lr"] = Cosine(2.0, 10)  # and a schedule again, at the optimizer's own count
    step(optimizer)
    assert shown(optimizer) == pytest.approx([Cosine(2.0, 10)(7)], rel=1e-15)


def test_a_schedule_is_replaced_by_another(backend: str) -> None:
    first, second = Cosine(1.0, 100), WSD(3, 10, 7, 0.5)
    params = make_params([(2,), (3,)])
    optimizer = FusedAdamW(copies(params), lr=first, weight_decay=0.1, backend=backend)
    reference = Float64AdamW(params, lr=first, weight_decay=0.1)
    for t in range(12):
        if t == 5:
            optimizer.param_groups[0]["lr"] = second
            reference.scheduler.lr_lambdas[0] = second
            for group in reference.optimizer.param_groups:
                group["lr"] = second(5)
        if t == 8:
            optimizer.param_groups[0]["weight_decay"] = Constant(0.3)
            reference.optimizer.param_groups[0]["weight_decay"] = 0.3
        grads = make_grads(params)
        set_grads(optimizer.param_groups[0]["params"], grads)
        optimizer.step()
        reference.step(grads)
        assert shown(optimizer) == pytest.approx([(second if t >= 5 else first)(t)], rel=1e-15)
    assert_same_run(optimizer, reference)


def test_lr_scale_changed_while_training(backend: str) -> None:
    optimizer = FusedAdamW(make_params([(2,)]), lr=Constant(1.0), backend=backend)
    for scale in (1.0, 0.5, 0.0, 3.0):
        optimizer.param_groups[0]["lr_scale"] = scale
        step(optimizer)
        assert shown(optimizer) == [scale]


# begin_decay and extend_stable: the rates are those of the schedule that the oracle makes of it.

BASE = {"peak_lr": 1e-2, "min_lr": 1e-3}
EVENTS = [
    (WSD(10, None, 8, **BASE), 30, "open-ended"),
    (WSD(10, None, 8, **BASE, decay_type="sqrt"), 10, "first stable step"),
    (WSD(10, None, 8, **BASE, decay_type="cosine"), 4, "warm-up of an open-ended one"),
    (WSD(10, 20, 8, **BASE), 15, "stable"),
    (WSD(10, 20, 8, **BASE, decay_type="cosine"), 7, "warm-up"),
    (WSD(10, 20, 8, **BASE), 0, "the very beginning"),
    (WSD(10, 20, 8, **BASE), 30, "first decay step"),
    (WSD(10, 20, 8, **BASE), 34, "decay"),
    (WSD(10, 20, 8, **BASE), 45, "done"),
    (WSD(0, 20, 8, **BASE), 0, "the beginning without warm-up"),
]


@pytest.mark.parametrize(("schedule", "at", "_name"), EVENTS, ids=[name for _, _, name in EVENTS])
@pytest.mark.parametrize("again", [False, True])
def test_begin_decay_equals_the_oracle(backend: str, schedule: WSD, at: int, _name: str, again: bool) -> None:
    optimizer = FusedAdamW(make_params([(2,)]), lr=schedule, backend=backend)
    expected: Schedule = schedule
    for t in range(60):
        if t == at:
            optimizer.begin_decay()
            expected = schedule.begin_decay(at)
        if again and t == at + 3:
            optimizer.begin_decay()  # one that has begun goes on
        step(optimizer)
        assert shown(optimizer) == pytest.approx([expected(t)], rel=1e-14), t


@pytest.mark.parametrize("at", [0, 5, 10, 20, 29, 30, 34, 45])
@pytest.mark.parametrize("n", [0, 1, 13])
def test_extend_stable_equals_the_oracle(backend: str, at: int, n: int) -> None:
    schedule = WSD(10, 20, 8, **BASE)
    optimizer = FusedAdamW(make_params([(2,)]), lr=schedule, backend=backend)
    expected = schedule
    for t in range(60):
        if t == at:
            optimizer.extend_stable(n)
            if schedule.phase(t) not in ("decay", "done"):
                expected = schedule.extend_stable(n)
        step(optimizer)
        assert shown(optimizer) == pytest.approx([expected(t)], rel=1e-14), t


def test_extended_then_ended(backend: str) -> None:
    schedule = WSD(2, 5, 4, **BASE)
    groups = [{"params": make_params([(2,)])}, {"params": make_params([(2,)]), "lr_scale": 0.5}]
    groups.append({"params": make_params([(2,)]), "lr": 0.1, "weight_decay": WSD(0, None, 6, 1.0)})
    optimizer = FusedAdamW(groups, lr=schedule, backend=backend)
    for _ in range(3):
        step(optimizer)
    before = snapshot_of_rates(optimizer)
    with pytest.raises(ValueError, match="open-ended"):
        optimizer.extend_stable(10)
    assert before == snapshot_of_rates(optimizer)
    optimizer.begin_decay()
    expected, decay = schedule.begin_decay(3), WSD(0, None, 6, 1.0).begin_decay(3)
    for t in range(3, 15):
        step(optimizer)
        assert shown(optimizer) == pytest.approx([expected(t), 0.5 * expected(t), 0.1])
        assert float(optimizer.param_groups[2]["weight_decay"]) == pytest.approx(decay(t))


def snapshot_of_rates(optimizer: FusedAdamW) -> list[list[list[float]]]:
    return [table.rows.tolist() for table in engine_of(optimizer).tables.values()]


@pytest.mark.parametrize("lr", [0.1, Cosine(1.0, 10), Constant(1.0)])
def test_without_a_wsd_there_is_nothing_to_decay(lr: Any) -> None:
    optimizer = FusedAdamW(make_params([(2,)]), lr=lr)
    for call in (optimizer.begin_decay, lambda: optimizer.extend_stable(1)):
        with pytest.raises(RuntimeError, match="no parameter group has a WSD schedule"):
            call()


@pytest.mark.parametrize(("n", "error"), [(-1, ValueError), (1.5, TypeError), ("1", TypeError), (True, TypeError)])
def test_extend_stable_takes_a_count(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="n must be an int from 0"):
        FusedAdamW(make_params([(2,)]), lr=WSD(1, 2, 3, 1.0)).extend_stable(n)
