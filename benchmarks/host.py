"""What costs host time however small the tensors are: a scheduler's step, a tensor more in the list."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contestants import factors, make_params, rate_scale
from benchmarks.peers import PEAK_LR, SCHEDULE, WARMUP_STEPS
from benchmarks.report import HostRow, Spread
from benchmarks.timing import Call, interleaved, microseconds
from nexus.optim import FusedAdamW
from nexus.training.schedulers import WSDScheduler

FEW, MANY = 100, 1000  # tensors, between which the cost of one more is measured
STEPS = 100  # over which allocations are counted


def measure_host(repeats: int) -> Iterator[HostRow]:
    """Time what does not depend on the sizes of tensors, `repeats` times each; count what a step allocates."""
    for groups in (1, 100):
        yield from _schedulers(groups, repeats)
    yield from _tensors(repeats)
    yield from _allocations()


def _in_turns(first: Call, second: Call, repeats: int) -> list[tuple[float, float]]:
    return interleaved(partial(microseconds, first), partial(microseconds, second), repeats)


def _group_list(groups: int) -> list[dict[str, Any]]:
    return [{"params": [param]} for param in make_params(((1,),) * groups)]


def _schedulers(groups: int, repeats: int) -> Iterator[HostRow]:
    """A step of each kind of scheduler, and what the built-in schedule adds to the optimizer's own step."""
    of = f"{groups} group{'s' * (groups > 1)}"
    calls: dict[str, Call] = {}
    for kind, rate in (("float", float), ("tensor", torch.tensor)):
        torch_groups = [{**group, "lr": rate(PEAK_LR)} for group in _group_list(groups)]
        torch_optimizer = torch.optim.AdamW(torch_groups, foreach=False)
        calls[f"LambdaLR.step(), {of}, {kind} rates"] = LambdaLR(torch_optimizer, factors(groups)).step
        torch_optimizer.step()
    optimizer = FusedAdamW(_group_list(groups))
    scheduler = WSDScheduler(optimizer, warmup_steps=WARMUP_STEPS, stable_steps=None, decay_steps=1, peak_lr=PEAK_LR)
    calls[f"WSDScheduler.step() over FusedAdamW, {of}"] = scheduler.step
    optimizer.step()
    for what, call in calls.items():
        times = _in_turns(call, lambda: None, repeats)
        yield HostRow(what, "µs", Spread.of([a for a, _ in times]))

    plain = FusedAdamW(_group_list(groups))
    rates = [rate_scale(i, groups) * SCHEDULE for i in range(groups)]
    scheduled = FusedAdamW([{**group, "lr": rate} for group, rate in zip(_group_list(groups), rates, strict=True)])
    times = _in_turns(scheduled.step, plain.step, repeats)
    yield HostRow(f"built-in Schedule adds to nexus step(), {of}", "µs", Spread.of([a - b for a, b in times]))


def _tensors(repeats: int) -> Iterator[HostRow]:
    makers: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
        "nexus": FusedAdamW,
        "torch fused": lambda params: torch.optim.AdamW(params, fused=True),
    }
    for name, make in makers.items():
        few, many = (make(make_params(((1,),) * count)) for count in (FEW, MANY))
        times = _in_turns(few.step, many.step, repeats)
        slopes = [(b - a) / (MANY - FEW) for a, b in times]
        yield HostRow(f"one more tensor in {name} step()", "µs", Spread.of(slopes))


def _allocations() -> Iterator[HostRow]:
    """What a step of nexus with everything on leaves behind. Torch operations are where tensors come from."""
    optimizer = FusedAdamW(make_params(((64,),) * FEW), lr=SCHEDULE, max_grad_norm=1.0)
    for _ in range(3):
        optimizer.step()
    with CountOperations() as counter:  # type: ignore[no-untyped-call]
        optimizer.step()
    blocks = sys.getallocatedblocks()
    for _ in range(STEPS):
        optimizer.step()
    blocks = sys.getallocatedblocks() - blocks
    yield HostRow("torch operations in nexus step()", "", Spread.of([counter.count]))
    yield HostRow("Python objects that nexus step() leaves behind", "", Spread.of([blocks // STEPS]))


class CountOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the torch operations that run inside it: each may allocate its result."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))
