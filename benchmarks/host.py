"""What costs host time however small the tensors are: a scheduler's step, a tensor more in the list."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import CASES, STEP
from benchmarks.contestants import SCHEDULE, WARMUP_STEPS, copy, factors, make_params, rate_scale
from benchmarks.peers import PEAK_LR
from benchmarks.rows import Spread
from benchmarks.timing import interleaved, microseconds
from nexus.backends import native
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.training.schedulers import WSDScheduler

FEW, MANY = 100, 1000  # tensors, between which the cost of one more is measured
STEPS = 100  # over which allocations are counted


@dataclass(frozen=True)
class HostRow:
    """One quantity."""

    what: str
    unit: str
    value: Spread


def measure_host(repeats: int) -> Iterator[HostRow]:
    """Time what does not depend on the sizes of tensors, `repeats` times each; count what a step allocates."""
    for groups in (1, 100):
        yield from _schedulers(groups, repeats)
    yield from _tensors(repeats)
    yield from _allocations()
    for name in ("tiny", "gpt"):
        yield from _parts(name, repeats)


def _in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> list[tuple[float, float]]:
    return interleaved(partial(microseconds, first), partial(microseconds, second), repeats)


def _alone(call: Callable[[], object], repeats: int) -> Spread:
    return Spread.of([a for a, _ in _in_turns(call, _nothing, repeats)])


def _parts(name: str, repeats: int) -> Iterator[HostRow]:
    """What a step of a case is made of, in the compiled backend, each part by itself and in a warm cache."""
    optimizer = FusedAdamW(make_params(CASES[name].shapes))
    optimizer.step()
    if optimizer.backend != native.NAME:
        return
    runner: Any = engine_of(optimizer).runner
    tensors, threads = runner._list, torch.get_num_threads()
    parts: dict[str, Callable[[], object]] = {
        "step()": optimizer.step,
        "of it, watching its tensors": partial(runner.changed, vars(optimizer)),
        f"of it, the update on {threads} threads": partial(tensors.step, threads, 0, 0),
        "the update on 1 thread": partial(tensors.step, 1, 0, 0),
        "a copy of as many bytes": copy(CASES[name], STEP),
        "of it, telling autograd": lambda: torch.autograd.graph.increment_version(tensors.written()),
    }
    for part, call in parts.items():
        yield HostRow(f"{name}: {part}", "µs", _alone(call, repeats))


def _group_list(groups: int) -> list[dict[str, Any]]:
    return [{"params": [param]} for param in make_params(((1,),) * groups)]


def _schedulers(groups: int, repeats: int) -> Iterator[HostRow]:
    """A step of each kind of scheduler, and what the built-in schedule adds to the optimizer's own step."""
    of = f"{groups} group{'s' * (groups > 1)}"
    calls: dict[str, Callable[[], object]] = {}
    for kind, rate in (("float", float), ("tensor", torch.tensor)):
        torch_groups = [{**group, "lr": rate(PEAK_LR)} for group in _group_list(groups)]
        torch_optimizer = torch.optim.AdamW(torch_groups, foreach=False)
        calls[f"LambdaLR.step(), {of}, {kind} rates"] = LambdaLR(torch_optimizer, factors(groups)).step
        torch_optimizer.step()
    optimizer = FusedAdamW(_group_list(groups))
    scheduler = WSDScheduler(optimizer, WARMUP_STEPS, None, 1, PEAK_LR)
    calls[f"WSDScheduler.step() over FusedAdamW, {of}"] = scheduler.step
    optimizer.step()
    for what, call in calls.items():
        yield HostRow(what, "µs", _alone(call, repeats))

    plain = FusedAdamW(_group_list(groups))
    scheduled = FusedAdamW(
        [{**group, "lr": rate_scale(i, groups) * SCHEDULE} for i, group in enumerate(_group_list(groups))]
    )
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
    blocks, heap = sys.getallocatedblocks(), _heap_bytes()
    for _ in range(STEPS):
        optimizer.step()
    blocks = sys.getallocatedblocks() - blocks
    heap_after = _heap_bytes()
    yield HostRow("torch operations in nexus step()", "", _exactly(counter.count))
    yield HostRow("Python objects that nexus step() leaves behind", "", _exactly(blocks // STEPS))
    if heap is not None and heap_after is not None:
        yield HostRow("memory that nexus step() leaves behind", "bytes", _exactly((heap_after - heap) / STEPS))


class CountOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the torch operations that run inside it: each may allocate its result."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class _MallInfo2(ctypes.Structure):  # of glibc's malloc.h
    _fields_ = (
        ("arena", ctypes.c_size_t),
        ("ordblks", ctypes.c_size_t),
        ("smblks", ctypes.c_size_t),
        ("hblks", ctypes.c_size_t),
        ("hblkhd", ctypes.c_size_t),  # bytes in blocks of their own, from mmap
        ("usmblks", ctypes.c_size_t),
        ("fsmblks", ctypes.c_size_t),
        ("uordblks", ctypes.c_size_t),  # bytes in use in all others
        ("fordblks", ctypes.c_size_t),
        ("keepcost", ctypes.c_size_t),
    )


def _heap_bytes() -> int | None:
    """What malloc has given out, where glibc can tell."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return None
    mallinfo2.restype = _MallInfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def _exactly(value: float) -> Spread:
    return Spread(value, value, value)


def _nothing() -> None:
    pass
