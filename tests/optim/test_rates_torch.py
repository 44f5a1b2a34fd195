"""Rates as torch has them: floats and tensors, and what is changed by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, copies, make_grads, make_params, set_grads

from nexus.optim import FusedAdamW
from nexus.schedules import WSD


def step(optimizer: FusedAdamW) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    set_grads(params, make_grads(params))
    optimizer.step()


# Tensors.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_rate_is_read_at_every_step(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    params = make_params([(5,), (6,)])
    lr, decay = torch.full(shape, 0.01, dtype=dtype), torch.full(shape, 0.1, dtype=dtype)
    optimizer = FusedAdamW(copies(params), lr=lr, weight_decay=decay, backend=backend)
    reference = Float64AdamW(params)
    address = lr.data_ptr()
    for t in range(6):
        lr.fill_(0.01 * (t + 1))
        decay.mul_(1.5)
        reference.optimizer.param_groups[0].update(lr=float(lr), weight_decay=float(decay))
        grads = make_grads(params)
        set_grads(optimizer.param_groups[0]["params"], grads)
        optimizer.step()
        reference.step(grads)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.data_ptr() == address
    assert float(lr) == float(torch.tensor(0.06, dtype=dtype))
    assert_same_run(optimizer, reference)


def test_a_tensor_rate_that_moves_is_followed(backend: str) -> None:
    params = make_params([(5,)])
    lr = torch.tensor(0.1)
    optimizer = FusedAdamW(params, lr=lr, weight_decay=0.0, backend=backend)
    step(optimizer)
    old = lr.data
    lr.data = torch.tensor(0.0)
    before = params[0].detach().clone()
    step(optimizer)
    assert torch.equal(params[0], before)
    assert float(old) == torch.tensor(0.1)
    lr.share_memory_()
    lr.fill_(0.5)
    step(optimizer)
    assert not torch.equal(params[0], before)
    lr.data = torch.tensor(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"lr as a tensor must .*got the shape \(\) of torch.int64"):
        step(optimizer)


def test_a_tensor_rate_is_not_aliased(backend: str) -> None:  # pytorch#163103
    lr = torch.tensor(0.1)
    optimizer = FusedAdamW(make_params([(5,)]), lr=lr, backend=backend)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["lr"] == pytest.approx(0.1)
    assert isinstance(saved["param_groups"][0]["lr"], float)  # transformers#18861: JSON
    lr.fill_(0.7)
    assert saved["param_groups"][0]["lr"] == pytest.approx(0.1)
    optimizer.load_state_dict(saved)  # pytorch#163093: neither replaced nor turned into a float
    assert optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)


def test_one_tensor_rate_for_several_groups(backend: str) -> None:
    lr = torch.tensor(0.1)
    params = make_params([(5,), (6,)])
    own = copies(params)
    groups = [{"params": own[:1]}, {"params": own[1:]}]
    optimizer, reference = FusedAdamW(groups, lr=lr, backend=backend), Float64AdamW(params, lr=float(lr))
    for _ in range(4):
        grads = make_grads(params)
        set_grads(own, grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


def test_float_tensor_and_schedule_in_turn(backend: str) -> None:
    params = make_params([(5,)])
    optimizer, reference = FusedAdamW(copies(params), backend=backend), Float64AdamW(params)
    rates: list[Any] = [0.1, torch.tensor(0.2), 0.3, torch.tensor(0.4, dtype=torch.float64), 1, 0.0, 0.5]
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        reference.optimizer.param_groups[0]["lr"] = float(rate)
        grads = make_grads(params)
        set_grads(optimizer.param_groups[0]["params"], grads)
        optimizer.step()
        reference.step(grads)
    assert_same_run(optimizer, reference)


# Precision.


@pytest.mark.parametrize("beta2", [0.9, 0.999, 0.9999, 1 - 1e-7])
def test_bias_correction_is_computed_in_float64(backend: str, beta2: float) -> None:
    # In float32, 1 - 0.9999**t is off by 2e-4. With a constant gradient, an update is just the rate.
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = FusedAdamW([param], lr=1.0, betas=(0.9, beta2), eps=0.0, weight_decay=0.0, backend=backend)
    for t in range(1, 11):
        param.grad = torch.full((3,), 0.37)
        optimizer.step()
        torch.testing.assert_close(param.detach(), torch.full((3,), -float(t)), rtol=2e-6, atol=0.0)


def test_a_rate_below_half_precision_is_not_rounded_to_it(backend: str) -> None:  # optax#1445
    param = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = FusedAdamW([param], lr=1.001e-3, eps=0.0, weight_decay=0.0, backend=backend)
    for _ in range(1):
        param.grad = torch.ones(3, dtype=torch.bfloat16)
        optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), -1.001e-3).bfloat16())


# Hyperparameters that are changed by hand while training.


def test_every_hyperparameter_may_change(backend: str) -> None:
    params = make_params([(5,), (40,)])
    own = copies(params)
    optimizer, reference = FusedAdamW(own, backend=backend), Float64AdamW(params)
    changes: list[dict[str, Any]] = [
        {"lr": 0.02},
        {"weight_decay": 0.3},
        {"betas": (0.8, 0.9)},
        {"betas": [0.7, 0.95]},
        {"eps": 1e-3},
        {"maximize": True},
        {"lr": 0.5, "maximize": False},
        {"lr": 1},
        {},
    ]
    for change in changes:
        optimizer.param_groups[0].update(change)
        reference.optimizer.param_groups[0].update(change)
        for _ in range(2):
            grads = make_grads(params)
            set_grads(own, grads)
            optimizer.step()
            reference.step(grads)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(["lr", "weight_decay", "eps", "lr_scale"], [-0.1, math.nan, math.inf, "0.1", None, 1j]),
        ("betas", (0.9, 1.0)),
        ("betas", 0.9),
        ("amsgrad", 1),
        ("maximize", None),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", "1"),
        ("lr_schedule", 0.1),
        ("weight_decay_schedule", "cosine"),
    ],
)
def test_a_bad_change_is_refused_and_changes_nothing(backend: str, name: str, value: Any) -> None:
    params = make_params([(5,)])
    optimizer = FusedAdamW(params, backend=backend)
    step(optimizer)
    before, good = params[0].detach().clone(), optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=name):
            step(optimizer)
    assert torch.equal(before, params[0])
    optimizer.param_groups[0][name] = good
    step(optimizer)
    assert not torch.equal(before, params[0])


def test_lambda_lr_over_a_schedule_is_saved_and_loaded() -> None:
    schedule = WSD(2, 3, 4, 0.1)
    optimizer = torch.optim.SGD(make_params([(3,)]), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    optimizer.step()
    scheduler.step()
    other = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(make_params([(3,)]), lr=1.0), WSD(2, 3, 4, 0.1))
    other.load_state_dict(scheduler.state_dict())
    assert other.get_last_lr() == scheduler.get_last_lr() == [schedule(1)]
