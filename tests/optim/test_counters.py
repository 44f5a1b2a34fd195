"""Counters: one advance a step, each parameter's own count, int64, skipped steps, and the rate an update uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import (
    Float64AdamW,
    assert_same_run,
    backward_both,
    copies,
    make_grads,
    make_params,
    params_of,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from side_by_side import train

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule

RATE = {"rel": 1e-15, "abs": 1e-18}  # on a GPU, the last bit of a cosine may be another


def lr(optimizer: FusedAdamW, group: int = 0) -> float:
    return float(optimizer.param_groups[group]["lr"])


@pytest.mark.parametrize("start", [2**24 - 2, 2**24 + 3, 2**31 - 1, 2**40])
@pytest.mark.parametrize("way", ["in place", "load_state_dict"])
def test_counts_go_on_beyond_what_float32_holds(backend: str, start: int, way: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer, reference = run_beside_torch(params, backend, steps=1, betas=(0.9, 1 - 1e-9))
    saved = optimizer.state_dict()
    for index, param in enumerate(params):
        if way == "in place":
            optimizer.state[param]["step"].fill_(start)
        saved["state"][index]["step"] = torch.tensor(start, dtype=torch.float64)
        step = reference.state(index)["step"]
        step.data = step.double().fill_(start)
    if way == "load_state_dict":
        optimizer.load_state_dict(saved)
    step_both(optimizer, reference, steps=5)
    assert [int(optimizer.state[param]["step"]) for param in params] == [start + 5] * 2
    assert_same_run(optimizer, reference)


def test_the_schedule_goes_on_beyond_what_float32_holds(backend: str) -> None:
    schedule = WSD(warmup_steps=2**24, stable_steps=2**24, decay_steps=2**25, peak_lr=1.0)
    optimizer = FusedAdamW(make_params([(3,)]), lr=schedule, backend=backend)
    saved = optimizer.state_dict()
    for start in (2**24 - 3, 2**25 - 3, 2**26 - 3, 2**53 - 6):
        saved["param_groups"][0]["lr_schedule"]["step"] = start
        optimizer.load_state_dict(saved)
        for step in range(start, start + 6):
            train(optimizer, 1)
            assert lr(optimizer) == schedule(step)


def test_one_advance_a_step_with_many_groups_and_dtypes(backend: str) -> None:
    schedule = Cosine(peak_lr=0.1, total_steps=50, warmup_steps=10)
    groups: list[dict[str, Any]] = [{"params": [], "lr_scale": 2.0}]
    for scale, dtype in ((1, torch.float32), (1 / 2, torch.bfloat16), (1 / 3, torch.float64), (1 / 4, torch.float32)):
        groups.append({"params": make_params([(3,), (7,)], dtype), "lr_scale": scale})
    optimizer, reference = run_beside_torch(groups, backend, steps=0, lr=schedule)
    for step in range(50):
        step_both(optimizer, reference, steps=1)
        expected = [group["lr_scale"] * schedule(step) for group in groups]
        assert [lr(optimizer, i) for i in range(5)] == pytest.approx(expected, **RATE)  # also where a group is empty
    assert_same_run(optimizer, reference)


def test_the_schedule_advances_where_no_gradient_is(backend: str) -> None:
    schedule = Cosine(peak_lr=0.1, total_steps=50)
    params = make_params([(3,)])
    optimizer = FusedAdamW(params, lr=schedule, backend=backend)
    for step in range(6):
        set_grads(params, make_grads(params) if step % 3 == 1 else [None])
        optimizer.step()
        assert lr(optimizer) == schedule(step)  # as a scheduler that is stepped once a step
    assert int(optimizer.state[params[0]]["step"]) == 2


def check_a_step_that_advances_nothing(backend: str) -> None:
    """It does all the rest."""
    params = make_params([(3,)])
    runs = [
        FusedAdamW(each, lr=Cosine(peak_lr=0.1, total_steps=50), backend=backend) for each in (params, copies(params))
    ]
    engine_of(runs[1]).advances = False
    for found_inf, advance in ((0.0, (1, 0)), (1.0, (0, 1))):
        for optimizer in runs:
            state = engine_of(optimizer).state_on(params_of(optimizer)[0].device)
            before = int(state.completed), int(state.skipped)
            optimizer.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]  # as a GradScaler does
            set_grads(params_of(optimizer), [torch.ones(3)])
            optimizer.step()
            moved = int(state.completed) - before[0], int(state.skipped) - before[1]
            assert moved == (advance if optimizer is runs[0] else (0, 0))
        assert same_bits(snapshot(runs[0]), snapshot(runs[1]))


def test_a_step_that_advances_nothing(backend: str) -> None:
    check_a_step_that_advances_nothing(backend)


def test_a_step_that_advances_nothing_in_triton(where_triton_runs: str) -> None:
    check_a_step_that_advances_nothing("triton")


def test_each_parameter_counts_its_own_updates(backend: str) -> None:
    params = make_params([(3,), (4,), (5,), (), (0,)])
    optimizer, reference = run_beside_torch(params, backend, steps=0, lr=Cosine(peak_lr=0.1, total_steps=50))
    for step in range(30):
        comes = [True, step % 2, step >= 20, step % 3, step % 5]  # a first gradient comes late
        grads = [grad if comes[i] else None for i, grad in enumerate(make_grads(params))]
        step_both(optimizer, reference, steps=1, grads=grads)
    assert [int(optimizer.state[param]["step"]) for param in params] == [30, 15, 10, 20, 24]
    assert_same_run(optimizer, reference)


def test_tied_weights_are_updated_once(backend: str) -> None:
    embed, head = torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False)
    head.weight = embed.weight
    params = list(torch.nn.Sequential(embed, head).parameters())
    optimizer, reference = run_beside_torch(params, backend, steps=0)
    backward_both(optimizer, reference, lambda: head(embed(torch.tensor([1, 2, 5]))).square().sum(), steps=5)
    assert [int(optimizer.state[param]["step"]) for param in params] == [5]
    assert_same_run(optimizer, reference)


# Which rate an update uses: that of the number of updates before it.

RUNS: list[Schedule] = [
    WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1, min_lr=0.01),
    WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1, min_lr=0.01, decay_type="cosine"),
    WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=0.1, min_lr=0.01, decay_type="sqrt"),
    WSD(warmup_steps=0, stable_steps=2, decay_steps=3, peak_lr=0.1),
    WSD(warmup_steps=2, stable_steps=0, decay_steps=3, peak_lr=0.1),
    WSD(warmup_steps=0, stable_steps=0, decay_steps=1, peak_lr=0.1, min_lr=0.05),
    CosineRestarts(peak_lr=0.1, min_lr=0.01, cycle_length=3, cycle_mult=2.0, warmup_steps=2),
    CosineRestarts(peak_lr=0.1, cycle_length=1),
    Cosine(peak_lr=0.1, total_steps=9, min_lr=0.01, warmup_steps=3),
]


@pytest.mark.parametrize("schedule", RUNS, ids=repr)
def test_the_first_and_last_update_of_every_phase_equal_torchs_loop(backend: str, schedule: Schedule) -> None:
    optimizer, reference = run_beside_torch(make_params([(4,), (3, 2)]), backend, steps=0, lr=schedule)
    assert lr(optimizer) == schedule(0)  # before any update, the one that comes
    for step in range(16):
        used = reference.optimizer.param_groups[0]["lr"]
        step_both(optimizer, reference, steps=1)
        assert used == schedule(step)
        assert lr(optimizer) == pytest.approx(used, **RATE)
        assert_same_run(optimizer, reference)


# Steps that are skipped.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_step_that_is_not_finite_changes_nothing(backend: str, dtype: torch.dtype, value: float) -> None:
    schedule = Cosine(peak_lr=0.1, total_steps=50)
    options: dict[str, Any] = {"lr": schedule, "weight_decay": schedule, "amsgrad": True}
    params = make_params([(), (600,), (3, 5)], dtype)
    reference = Float64AdamW(params, **options)
    optimizer = FusedAdamW(params, skip_nonfinite=True, backend=backend, **options)
    for step in range(20):
        grads = make_grads(params)
        if step % 3 and step != 10:
            step_both(optimizer, reference, steps=1, grads=grads)
            assert lr(optimizer) == schedule(reference.completed - 1)
        else:  # also the very first, and two in a row after one that was not
            grads[step % 2 * 2].view(-1)[-1] = value
            set_grads(params, grads)
            before = snapshot(optimizer), lr(optimizer)
            optimizer.step()
            assert step == 0 or same_bits(before[0], snapshot(optimizer))
            assert before[1] == lr(optimizer)
            assert not optimizer.grad_norm.isfinite()
        assert int(optimizer.skipped_steps) == step + 1 - reference.completed
    assert_same_run(optimizer, reference)


def test_large_but_finite_gradients_are_not_skipped(backend: str) -> None:
    params = make_params([(5,), (4,)])
    optimizer = FusedAdamW(params, skip_nonfinite=True, backend=backend)
    set_grads(params, [torch.full((5,), 3e38), torch.full((4,), -3e38)])
    optimizer.step()
    assert int(optimizer.skipped_steps) == 0
    assert int(optimizer.state[params[0]]["step"]) == 1
