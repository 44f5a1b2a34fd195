"""Counters: one advance a step, each parameter's own count, int64, skipped steps, and the rate an update uses."""

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
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule

RATE = {"rel": 1e-15, "abs": 1e-18}  # on a GPU, the last bit of a cosine may be another


def lr(optimizer: FusedAdamW, group: int = 0) -> float:
    return float(optimizer.param_groups[group]["lr"])


@pytest.mark.parametrize("start", [2**24 - 2, 2**24 + 3, 2**31 - 1, 2**40])
@pytest.mark.parametrize("way", ["in place", "load_state_dict"])
def test_counts_go_on_beyond_what_float32_holds(backend: str, start: int, way: str) -> None:
    params = make_params([(3,), (4,)])
    optimizer, reference = run_beside_torch(params, backend, steps=1, betas=(0.9, 1 - 1e-9))
    if way == "in place":
        for param in params:
            optimizer.state[param]["step"].fill_(start)
    else:
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["step"] = torch.tensor(start, dtype=torch.float64)
        optimizer.load_state_dict(saved)
    for index in range(len(params)):
        step = reference.state(index)["step"]
        step.data = step.double().fill_(start)
    step_both(optimizer, reference, steps=5)
    assert [int(optimizer.state[param]["step"]) for param in params] == [start + 5] * 2
    assert_same_run(optimizer, reference)


def test_the_schedule_goes_on_beyond_what_float32_holds(backend: str) -> None:
    schedule = WSD(2**24, 2**24, 2**25, 1.0)
    params = make_params([(3,)])
    optimizer = FusedAdamW(params, lr=schedule, backend=backend)
    saved = optimizer.state_dict()
    for start in (2**24 - 3, 2**25 - 3, 2**26 - 3, 2**53 - 6):
        saved["param_groups"][0]["lr_schedule"]["step"] = start
        optimizer.load_state_dict(saved)
        for step in range(start, start + 6):
            set_grads(params, make_grads(params))
            optimizer.step()
            assert lr(optimizer) == schedule(step)


def test_one_advance_a_step_with_many_groups_and_dtypes(backend: str) -> None:
    schedule = Cosine(0.1, 50, warmup_steps=10)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float32]
    params = [make_params([(3,), (7,)], dtype) for dtype in dtypes]
    groups = [{"params": own, "lr": schedule, "lr_scale": 1.0 / (i + 1)} for i, own in enumerate(params)]
    groups.append({"params": [], "lr": schedule, "lr_scale": 2.0})
    optimizer = FusedAdamW(groups, backend=backend)
    reference = Float64AdamW([dict(group) for group in groups[:-1]])
    for step in range(50):
        grads = [make_grads(own) for own in params]
        for own, own_grads in zip(params, grads, strict=True):
            set_grads(own, own_grads)
        optimizer.step()
        reference.step([grad for own_grads in grads for grad in own_grads])
        expected = [group["lr_scale"] * schedule(step) for group in groups]
        assert [lr(optimizer, i) for i in range(5)] == pytest.approx(expected, **RATE)  # also where a group is empty
    optimizer.param_groups.pop()
    assert_same_run(optimizer, reference)


def test_the_schedule_advances_where_no_gradient_is(backend: str) -> None:
    schedule = Cosine(0.1, 50)
    params = make_params([(3,)])
    optimizer = FusedAdamW(params, lr=schedule, backend=backend)
    for step in range(6):
        set_grads(params, make_grads(params) if step % 3 == 1 else [None])
        optimizer.step()
        assert lr(optimizer) == schedule(step)  # as a scheduler that is stepped once a step
    assert int(optimizer.state[params[0]]["step"]) == 2


def test_each_parameter_counts_its_own_updates(backend: str) -> None:
    schedule = Cosine(0.1, 50)
    params = make_params([(3,), (4,), (5,)])
    optimizer = FusedAdamW(copies(params), lr=schedule, backend=backend)
    reference = Float64AdamW(params, lr=schedule)
    own = optimizer.param_groups[0]["params"]
    for step in range(30):
        grads: list[Tensor | None] = list(make_grads(params))
        grads[1] = grads[1] if step % 2 else None
        grads[2] = grads[2] if step >= 20 else None  # its first gradient comes late
        set_grads(own, grads)
        optimizer.step()
        reference.step(grads)
    assert [int(optimizer.state[param]["step"]) for param in own] == [30, 15, 10]
    assert_same_run(optimizer, reference)


def test_tied_weights_are_updated_once(backend: str) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(6, 4)
            self.head = torch.nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

    module = Tied()
    params = list(module.parameters())
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(params)
    for _ in range(5):
        optimizer.zero_grad()
        module.head(module.embed(torch.tensor([1, 2, 5]))).square().sum().backward()
        reference.step([params[0].grad])
        optimizer.step()
    assert len(params) == 1
    assert int(optimizer.state[params[0]]["step"]) == 5
    assert_same_run(optimizer, reference)


# Which rate an update uses: that of the number of updates before it.

RUNS: list[Schedule] = [
    WSD(3, 4, 5, 0.1, 0.01),
    WSD(3, 4, 5, 0.1, 0.01, "cosine"),
    WSD(3, 4, 5, 0.1, 0.01, "sqrt"),
    WSD(0, 2, 3, 0.1),
    WSD(2, 0, 3, 0.1),
    WSD(0, 0, 1, 0.1, 0.05),
    CosineRestarts(0.1, 0.01, 3, 2.0, 2),
    CosineRestarts(0.1, cycle_length=1),
    Cosine(0.1, 9, 0.01, 3),
]


@pytest.mark.parametrize("schedule", RUNS, ids=repr)
def test_the_first_and_last_update_of_every_phase_equal_torchs_loop(backend: str, schedule: Schedule) -> None:
    params = make_params([(4,), (3, 2)])
    optimizer = FusedAdamW(params, lr=schedule, backend=backend)
    reference = Float64AdamW(params, lr=schedule)
    assert lr(optimizer) == schedule(0)  # before any update, the one that comes
    for step in range(16):
        used = reference.optimizer.param_groups[0]["lr"]
        step_both(optimizer, reference, steps=1)
        assert used == schedule(step)
        assert lr(optimizer) == pytest.approx(used, **RATE)
        assert_same_run(optimizer, reference)


def test_the_first_rate_of_a_warmup_changes_the_moments_alone(backend: str) -> None:
    params = make_params([(4,)])
    before = params[0].detach().clone()
    optimizer = FusedAdamW(params, lr=WSD(5, 5, 5, 0.1), backend=backend)
    set_grads(params, make_grads(params))
    optimizer.step()
    assert torch.equal(params[0], before)
    assert optimizer.state[params[0]]["exp_avg"].all()
    optimizer.step()
    assert not torch.equal(params[0], before)


# Steps that are skipped.


def spoiled(grads: list[Tensor], value: float, where: int) -> list[Tensor]:
    grads[where].view(-1)[-1] = value
    return grads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_step_that_is_not_finite_changes_nothing(backend: str, dtype: torch.dtype, value: float) -> None:
    schedule = Cosine(0.1, 50)
    params = make_params([(), (600,), (3, 5)], dtype)
    options: dict[str, Any] = {"lr": schedule, "weight_decay": schedule, "amsgrad": True}
    optimizer = FusedAdamW(copies(params), skip_nonfinite=True, backend=backend, **options)
    reference = Float64AdamW(params, **options)
    own = optimizer.param_groups[0]["params"]
    assert int(optimizer.skipped_steps) == 0
    skipped = 0
    for step in range(20):
        grads = make_grads(params)
        if step % 3 == 0 or step == 10:  # also the very first, and two in a row after one that was not
            set_grads(own, spoiled(grads, value, step % 2 * 2))
            before = snapshot(optimizer), lr(optimizer)
            optimizer.step()
            skipped += 1
            now = snapshot(optimizer), lr(optimizer)
            assert step == 0 or same_bits(before[0], now[0])
            assert before[1] == now[1]
            assert not optimizer.grad_norm.isfinite()
        else:
            set_grads(own, grads)
            optimizer.step()
            reference.step(grads)
            assert lr(optimizer) == schedule(step - skipped)
        assert int(optimizer.skipped_steps) == skipped
    assert_same_run(optimizer, reference)


def test_without_the_option_nothing_is_skipped(backend: str) -> None:
    params = make_params([(5,)])
    optimizer = FusedAdamW(params, backend=backend)
    set_grads(params, spoiled(make_grads(params), torch.nan, 0))
    optimizer.step()
    assert int(optimizer.state[params[0]]["step"]) == 1
    assert params[0].isnan().sum() == 1
    assert int(optimizer.skipped_steps) == 0


def test_large_but_finite_gradients_are_not_skipped(backend: str) -> None:
    params = make_params([(5,), (4,)])
    optimizer = FusedAdamW(params, skip_nonfinite=True, backend=backend)
    set_grads(params, [torch.full((5,), 3e38), torch.full((4,), -3e38)])
    optimizer.step()
    assert int(optimizer.skipped_steps) == 0
    assert int(optimizer.state[params[0]]["step"]) == 1
