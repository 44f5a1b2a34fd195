"""What the demo prints at the end: how well it learned, and what the optimizer costs beside torch's own."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gpt.model import GPT
from gpt.train import BETAS, MAX_GRAD_NORM, Training, make_optimizer, parameter_groups
from nexus.schedules import Schedule

PROMPT = b"def "
WARMUP = 4  # rounds that are not counted: threads and caches are cold, state is being allocated


@dataclass(frozen=True)
class StepCost:
    """Medians, in seconds: forward and backward, then clip + schedule + update by nexus and by torch."""

    forward_backward: float
    nexus: float
    torch: float

    def of(self, update: float) -> str:
        """The part of a step that `update` seconds are, and their number."""
        return f"{update / (self.forward_backward + update):6.2%}  {update * 1e3:8.3f} ms"


def text(training: Training, cost: StepCost, picture: Path) -> str:
    """The report, in ASCII, so that every terminal and log shows it."""
    config = training.config
    parameters = sum(p.numel() for p in training.model.parameters())
    where = f"threads: {config.threads}" if config.device == "cpu" else torch.cuda.get_device_name()
    seen = training.step * training.bytes_a_step
    speed = seen / training.seconds if training.seconds else 0.0
    nexus = f"FusedAdamW ({training.optimizer.backend})"
    return f"""\
A GPT of {parameters / 1e6:.2f} million parameters read {seen / 1e6:.2f} MB of {training.corpus.source}
in {training.step:,} steps and {training.seconds:.0f} s ({speed:,.0f} tokens/s) on {config.device} ({where}).

  held-out text   {training.before:.3f} -> {training.after:.3f} bits per byte
  learning rate   differs from the formula by at most {training.largest_rate_difference():g}
  share of step   {cost.of(cost.nexus)}  {nexus}: clipping, schedule and update in one
                  {cost.of(cost.torch)}  torch: clip_grad_norm_, AdamW(fused=True), LambdaLR
  picture         {picture}

{_sample(training)}"""


def _sample(training: Training) -> str:
    """Text that the model writes, behind a margin; what a terminal might obey is shown as `?`."""
    written = training.model.generate(PROMPT, training.config.size.sample_bytes, seed=training.config.seed)
    printable = "".join(chr(byte) if 32 <= byte < 127 or byte == 10 else "?" for byte in written)
    return "\n".join(f"  | {line}".rstrip() for line in printable.split("\n"))


def time_step(training: Training) -> StepCost:
    """Train two copies of the model on the same batches, one by each optimizer, and take the medians.

    Each copy computes its own gradients, so each update is timed as it happens in training, right after a
    backward pass; who goes first alternates. The copies stay equal up to rounding, and so do their gradients.
    """
    schedule = training.config.schedule
    models = [copy.deepcopy(training.model) for _ in range(2)]
    updates = [make_optimizer(models[0], schedule).step, _torch_update(models[1], schedule)]
    compute: list[float] = []
    update: tuple[list[float], list[float]] = ([], [])  # of nexus, of torch
    for round_ in range(WARMUP + training.config.size.timed_steps):
        batch = training.batch(round_)
        for i in (0, 1) if round_ % 2 else (1, 0):
            seconds = _seconds(training, partial(_backward, models[i], batch)), _seconds(training, updates[i])
            if round_ >= WARMUP:
                compute.append(seconds[0])
                update[i].append(seconds[1])
    return StepCost(*(statistics.median(times) for times in (compute, *update)))


def _torch_update(model: GPT, schedule: Schedule) -> Callable[[], None]:
    """The usual loop's three calls, with torch's fastest AdamW."""
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1.0, betas=BETAS, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()

    return update


def _backward(model: GPT, batch: tuple[Tensor, Tensor]) -> None:
    model.zero_grad()
    model.loss(*batch).backward()  # type: ignore[no-untyped-call]


def _seconds(training: Training, call: Callable[[], object]) -> float:
    wait: Callable[[], object] = torch.cuda.synchronize if training.config.device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started
