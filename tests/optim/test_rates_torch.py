"""Rates as torch has them: floats and tensors, and what is changed by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from references import assert_same_run, copies, make_params, run_beside_torch, same_bits, step_both
from side_by_side import param, train
from torch.optim.lr_scheduler import LambdaLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_rate_is_read_at_every_step(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lr, decay = torch.full(shape, 0.01, dtype=dtype), torch.full(shape, 0.1, dtype=dtype)
    groups = [{"params": make_params([size])} for size in ((5,), (6,))]  # which share the tensors
    optimizer, reference = run_beside_torch(groups, backend, steps=0, lr=lr, weight_decay=decay)
    address = lr.data_ptr()
    for t in range(6):
        lr.fill_(0.01 * (t + 1))
        decay.mul_(1.5)
        for group in reference.optimizer.param_groups:
            group.update(lr=float(lr), weight_decay=float(decay))
        step_both(optimizer, reference, steps=1)
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    assert lr.data_ptr() == address
    assert float(lr) == float(torch.tensor(0.06, dtype=dtype))
    assert_same_run(optimizer, reference)


def test_a_tensor_rate_that_moves_is_followed(backend: str) -> None:
    params = make_params([(5,)])
    lr = torch.tensor(0.1)
    optimizer = FusedAdamW(params, lr=lr, weight_decay=0.0, backend=backend)
    train(optimizer, 1)
    old = lr.data
    lr.data = torch.tensor(0.0)
    before = copies(params)
    train(optimizer, 1)
    assert same_bits(params, before)
    assert float(old) == torch.tensor(0.1)
    lr.share_memory_()
    lr.fill_(0.5)
    train(optimizer, 1)
    assert not torch.equal(params[0], before[0])
    lr.data = torch.tensor(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lr as a tensor must .*got the shape \(\) of torch.int64"):
        train(optimizer, 1)


def test_a_tensor_rate_is_not_aliased(backend: str) -> None:  # pytorch#163103
    lr = torch.tensor(0.1)
    optimizer = FusedAdamW(make_params([(5,)]), lr=lr, backend=backend)
    saved = optimizer.state_dict()
    assert isinstance(saved["param_groups"][0]["lr"], float)  # transformers#18861: JSON
    lr.fill_(0.7)
    assert saved["param_groups"][0]["lr"] == pytest.approx(0.1)
    optimizer.load_state_dict(saved)  # pytorch#163093: neither replaced nor turned into a float
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)


# Precision.


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999, 1 - 1e-7])
def test_bias_correction_is_computed_in_float64(backend: str, beta2: float) -> None:
    # In float32, 1 - 0.9999**t is off by 2e-4. With a constant gradient, an update is just the rate.
    weight = param(3, dtype=torch.float32, value=0.0)
    optimizer = FusedAdamW([weight], lr=1.0, betas=(0.9, beta2), eps=0.0, weight_decay=0.0, backend=backend)
    weight.grad = torch.full((3,), 0.37)
    for t in range(1, 11):
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((3,), -float(t)), rtol=2e-6, atol=0.0)


def test_a_rate_below_half_precision_is_not_rounded_to_it(backend: str) -> None:  # optax#1445
    weight = param(3, dtype=torch.bfloat16, value=0.0)
    weight.grad = torch.ones_like(weight)
    FusedAdamW([weight], lr=1.001e-3, eps=0.0, weight_decay=0.0, backend=backend).step()
    assert torch.equal(weight.detach(), torch.full((3,), -1.001e-3).bfloat16())


# Hyperparameters that are changed by hand while training.


def test_every_hyperparameter_may_change(backend: str) -> None:
    changes: list[dict[str, Any]] = [
        {"lr": 0.02},
        {"lr": torch.tensor(0.2)},
        {"weight_decay": 0.3},
        {"lr": 0.3},
        {"lr": torch.tensor(0.4, dtype=torch.float64)},
        {"betas": (0.8, 0.9)},
        {"betas": [0.7, 0.95]},
        {"eps": 1e-3},
        {"maximize": True},
        {"lr": 0.0},
        {"lr": 0.5, "maximize": False},
        {"lr": 1},
        {},
    ]
    optimizer, reference = run_beside_torch(make_params([(5,), (40,)]), backend, steps=1)
    for change in changes:
        optimizer.param_groups[0].update(change)
        reference.optimizer.param_groups[0].update(change)
        if "lr" in change:
            reference.optimizer.param_groups[0]["lr"] = float(change["lr"])
        step_both(optimizer, reference, steps=2)
        assert_same_run(optimizer, reference, str(change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["lr", "weight_decay", "eps", "lr_scale"], [-0.1, math.nan, math.inf, "0.1", None, 1j]),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("amsgrad", 1),
        ("maximize", None),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", "1"),
        ("lr_schedule", 0.1),
        ("weight_decay_schedule", "cosine"),
    ],
)
def test_a_bad_change_is_refused_and_changes_nothing(backend: str, name: str, value: Any) -> None:
    params = make_params([(5,)])
    optimizer = FusedAdamW(params, backend=backend)
    train(optimizer, 1)
    before, good = copies(params), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=name):
            train(optimizer, 1)
    assert same_bits(params, before)
    optimizer.param_groups[0][name] = good
    train(optimizer, 1)
    assert not same_bits(params, before)


def test_lambda_lr_over_a_schedule_is_saved_and_loaded() -> None:
    schedule = WSD(warmup_steps=2, stable_steps=3, decay_steps=4, peak_lr=0.1)
    first, second = (
        LambdaLR(torch.optim.SGD([param(3)], lr=1.0), WSD(warmup_steps=2, stable_steps=3, decay_steps=4, peak_lr=0.1))
        for _ in range(2)
    )
    first.optimizer.step()
    first.step()
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == first.get_last_lr() == [schedule(1)]
