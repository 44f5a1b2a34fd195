"""Optimizers over tensors of their own with the same values, each with one call that does a job of a case."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.cases import (
    AVERAGE_DECAY,
    BFLOAT16,
    CLIP_STEP_SCHEDULE,
    COPY,
    FLOAT32,
    NEXUS_FLOAT32,
    NEXUS_TRITON,
    NO_AVERAGE,
    SEPARATE_AVERAGE,
    STEP,
    Case,
    Shape,
)
from benchmarks.peers import MAX_GRAD_NORM, PEAK_LR, PEERS, SCHEDULE, warmup
from benchmarks.timing import PROCESSOR, Device
from nexus.optim import FusedAdamW

MAX_DRAWN = 1 << 18  # random numbers of a tensor
MAX_COPIED = 1 << 26  # float32 numbers at once: more than any cache holds
BFLOAT16_REMARK = "its moments are bfloat16, those of nexus float32"


@dataclass
class Contestant:
    """Something to be timed. `call` does the job; a CUDA graph does `in_graph`, and the host then `beside_graph`."""

    call: Callable[[], object]
    params: list[Tensor] = field(default_factory=list)
    in_graph: Callable[[], object] | None = None
    beside_graph: Callable[[], object] | None = None
    optimizer: FusedAdamW | None = None  # of this package's
    restore: Callable[[], object] = lambda: None  # before each call that is timed
    remark: str = ""
    is_noisy: bool = False  # its state has fewer bits, so that single elements go another way
    compared = "parameters"

    def __post_init__(self) -> None:
        self.first_before = self.params[0].clone() if self.params else None

    @property
    def backend(self) -> str:
        """Of this package's optimizer; empty for another's."""
        return "" if self.optimizer is None else self.optimizer.backend

    def prepare(self) -> None:
        """The first step, which allocates state."""
        self.call()

    def difference(self, other: Contestant) -> float | None:
        """How far the parameters are from those of the other, as a share of the way that these have gone.

        In float32 this is the largest difference over all parameters, and the largest way of the first. In bfloat16,
        where a way is a few roundings long and the two sides' moments may be rounded differently, and of state in
        fewer bits, it is that of the means over the first parameter. None where the other is a copy.
        """
        if other.first_before is None:
            return None
        if self.is_noisy or torch.bfloat16 in (self.params[0].dtype, other.first_before.dtype):
            x, y, before = (tensor.float() for tensor in (self.params[0], other.params[0], other.first_before))
            return float((x - y).abs().mean() / (y - before).abs().mean())
        way = (other.params[0] - other.first_before).abs().max()
        largest = max((x - y).abs().max() for x, y in zip(self.params, other.params, strict=True))
        return float(largest / way)


def make_params(
    shapes: tuple[Shape, ...], dtype: torch.dtype = torch.float32, device: torch.device = PROCESSOR.where
) -> list[Tensor]:
    """Parameters with gradients, the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    params = [(0.02 * _noise(shape, generator)).to(dtype) for shape in shapes]
    for param in params:
        param.grad = (0.1 * _noise(param.shape, generator)).to(dtype)
    return params


def _noise(shape: Shape, generator: torch.Generator) -> Tensor:
    """Normally distributed, and over again where it is long: drawing every number would take most of a run."""
    numel = math.prod(shape)
    drawn = torch.randn(min(numel, MAX_DRAWN), generator=generator, device=generator.device)
    return drawn.repeat(-(-numel // MAX_DRAWN))[:numel].view(shape)


def rate_scale(index: int, groups: int) -> float:
    """Of group `index`: from 0.5 to 1.5."""
    return 0.5 + index / (groups - 1) if groups > 1 else 1.0


def nexus_optimizer(case: Case, job: str, params: list[Tensor], backend: str = "auto") -> FusedAdamW:
    """One whose `step` does the whole job."""
    if job == STEP:
        return FusedAdamW(params, lr=PEAK_LR, backend=backend, **case.options)
    parts = enumerate(_dealt(params, case.groups))
    groups = [{"params": part, "lr": rate_scale(i, case.groups) * SCHEDULE} for i, part in parts]
    clip = MAX_GRAD_NORM if job == CLIP_STEP_SCHEDULE else None
    return FusedAdamW(groups, max_grad_norm=clip, backend=backend)


def nexus(case: Case, job: str, device: Device = PROCESSOR, backend: str = "auto") -> Contestant:
    """The optimizer of this package."""
    params = make_params(case.shapes, getattr(torch, case.dtype), device.where)
    optimizer = nexus_optimizer(case, job, params, backend)
    return Contestant(optimizer.step, params, optimizer.step, optimizer=optimizer, is_noisy=bool(case.mode))


def averaging(contestant: Contestant) -> Contestant:
    """One that averages its parameters in a pass of its own after each step, as torch's `AveragedModel` does."""
    step, params = contestant.call, contestant.params
    averages = [param.clone() for param in params]

    def step_and_average() -> None:
        step()
        torch._foreach_lerp_(averages, params, 1.0 - AVERAGE_DECAY)

    return replace(contestant, call=step_and_average, in_graph=step_and_average)


def peer(case: Case, job: str, name: str, device: Device = PROCESSOR) -> Contestant:
    """The optimizer that `name` stands for, with what the usual training loop calls around it; or a copy."""
    if name == NEXUS_TRITON:
        return nexus(case, job, device, "triton")
    if name == NEXUS_FLOAT32:
        return nexus(replace(case, mode="", dtype=FLOAT32), job, device)
    if name == NO_AVERAGE:
        return nexus(replace(case, average=False), job, device)
    if name == SEPARATE_AVERAGE:
        return averaging(nexus(replace(case, average=False), job, device))
    if name == COPY:
        copies = copy(case, job, device)
        return Contestant(copies, in_graph=copies)
    dtype = PEERS[name].dtype or case.dtype
    params = make_params(case.shapes, getattr(torch, dtype), device.where)
    optimizer = PEERS[name].make([{"params": part} for part in _dealt(params, case.groups)], device.where)
    scheduler = None if job == STEP else LambdaLR(optimizer, factors(case.groups))

    def clip_and_step() -> None:
        if job == CLIP_STEP_SCHEDULE:
            torch.nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()

    def call() -> None:
        clip_and_step()
        if scheduler is not None:
            scheduler.step()

    in_graph = clip_and_step if PEERS[name].capturable else None
    # A scheduler computes the rate on the host: a graph would hold that of one step for ever.
    beside_graph = None if scheduler is None else scheduler.step
    remark = BFLOAT16_REMARK if dtype == BFLOAT16 and not case.mode else ""
    made = Contestant(call, params, in_graph, beside_graph, remark=remark)
    if PEERS[name].overwrites_gradients:
        made.restore = _restoring_gradients(params)
    return made


def _restoring_gradients(params: list[Tensor]) -> Callable[[], object]:
    """A call that gives them the gradients that they have now."""
    grads = [param.grad for param in params if param.grad is not None]
    return partial(torch._foreach_copy_, grads, [grad.clone() for grad in grads])


def copy(case: Case, job: str, device: Device = PROCESSOR) -> Callable[[], object]:
    """A call that copies half of the bytes that the job moves: it reads and writes as many."""
    items = case.bytes_moved(job) // 2 // 4
    source = torch.ones(min(items, MAX_COPIED), device=device.where)
    target = torch.ones_like(source)
    times, rest = divmod(items, source.numel())

    def call() -> None:
        for _ in range(times):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return call


def factors(groups: int) -> list[Callable[[int], float]]:
    """What `LambdaLR` takes: a function of the step for each group."""
    return [partial(warmup, scale=rate_scale(i, groups)) for i in range(groups)]


def _dealt(params: list[Tensor], groups: int) -> list[list[Tensor]]:
    return [params[i::groups] for i in range(groups)]
