"""What the tests of clocks train: rates by tokens, beside torch; and a guard that forbids to wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Float64AdamW, assert_same_run, make_params, step_both
from torch.utils._python_dispatch import TorchDispatchMode

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Clock, Cosine

BY_TOKENS = WSD(warmup_steps=1000, stable_steps=1500, decay_steps=2000, peak_lr=1e-2, min_lr=1e-4)
DECAY = Cosine(peak_lr=0.3, total_steps=4000)
BY_UPDATES = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=2e-2)
COUNTS = (100, 450, 0, 7, 443, 999, 501, 1, 2000, 123)


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a number of a tensor back to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def train_by_tokens(backend: str, tensors: bool) -> None:
    """Two groups by tokens and one by updates, which follow the oracle, and torch in float64 with these rates."""
    clock = Clock()
    groups: list[dict[str, Any]] = [
        {"params": make_params([(5,), (3, 4)]), "lr": BY_TOKENS.at(clock), "weight_decay": DECAY.at(clock)},
        {"params": make_params([(6,)]), "lr": BY_UPDATES},
        {"params": make_params([(7,)]), "lr": BY_TOKENS.at(clock), "lr_scale": 0.5},
    ]
    reference = Float64AdamW([{**group, "lr": 1.0, "weight_decay": 0.01} for group in groups])
    optimizer = FusedAdamW(groups, backend=backend)
    count = 0
    for t, n in enumerate(COUNTS):
        rates = [BY_TOKENS(count), BY_UPDATES(t), 0.5 * BY_TOKENS(count)]
        for theirs, rate in zip(reference.optimizer.param_groups, rates, strict=True):
            theirs["lr"] = rate
        reference.optimizer.param_groups[0]["weight_decay"] = DECAY(count)
        step_both(optimizer, reference, steps=1)
        assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-14)
        assert float(optimizer.param_groups[0]["weight_decay"]) == pytest.approx(DECAY(count), rel=1e-13)
        moved = torch.tensor(n, dtype=torch.int32) if tensors else n
        with NoWaiting():
            optimizer.advance(clock, moved)
        count += n
        assert clock.count == count
    assert optimizer.backend == backend
    assert_same_run(optimizer, reference)
