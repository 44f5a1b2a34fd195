"""Settings that move at a clock, and that hear a metric."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from references import copies, make_grads, make_params, same_bits, set_grads, snapshot

from nexus.optim import FusedAdamW
from nexus.schedules import Clock, Linear, ReduceOnPlateau

LIMIT, BETA2 = Linear(start_lr=1.0, end_lr=0.25, total_steps=8), Linear(start_lr=0.9, end_lr=0.99, total_steps=8)
OF_TOKENS = Linear(start_lr=1.0, end_lr=0.25, total_steps=800), Linear(start_lr=0.9, end_lr=0.99, total_steps=800)


def run(optimizer: FusedAdamW, clock: Clock | None, steps: range) -> None:
    params = optimizer.param_groups[0]["params"]
    for step in steps:
        torch.manual_seed(step)
        set_grads(params, make_grads(params))
        optimizer.step()
        if clock is not None:
            optimizer.advance(clock, 100)


def test_betas_and_the_limit_of_the_norm_at_a_clock_of_tokens(backend: str) -> None:
    start, runs = make_params([(7,), (130, 5)]), []
    for clock in (Clock(), None):
        limit, beta2 = LIMIT, BETA2
        if clock is not None:
            limit, beta2 = OF_TOKENS[0].at(clock), OF_TOKENS[1].at(clock)
        options: dict[str, Any] = {"betas": (0.9, beta2), "max_grad_norm": limit, "backend": backend}
        optimizer = FusedAdamW(copies(start), lr=1e-2, **options)
        run(optimizer, clock, range(6))
        saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
        assert saved["param_groups"][0]["betas"] == (0.9, pytest.approx(BETA2(6), rel=1e-15))
        optimizer = FusedAdamW(copies(optimizer.param_groups[0]["params"]), lr=1e-2, **options)
        optimizer.load_state_dict(saved)
        run(optimizer, clock, range(6, 9))
        runs.append(snapshot(optimizer))
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_plateau_of_the_limit_of_the_norm(backend: str) -> None:
    limit = ReduceOnPlateau(Linear(start_lr=1.0, end_lr=1.0, total_steps=1), factor=0.5, patience=0)
    (param,) = params = make_params([(4,)])
    optimizer = FusedAdamW(params, lr=1e-2, max_grad_norm=limit, backend=backend)
    history = optimizer.history()
    for metric in (1.0, 2.0, 3.0):
        param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.report(torch.tensor(metric))
    assert history.read().clip.flatten().tolist() == pytest.approx([0.5, 0.5, 0.25], rel=1e-5)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["max_grad_norm"] == 0.25
    other = FusedAdamW(copies(params), lr=1e-2, max_grad_norm=limit, backend=backend)
    other.load_state_dict(saved)
    for each in (optimizer, other):
        (own,) = each.param_groups[0]["params"]
        own.grad = torch.ones_like(own)
        each.step()
    assert same_bits(snapshot(optimizer), snapshot(other))
