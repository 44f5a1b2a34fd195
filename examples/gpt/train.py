"""The training loop: nothing in it waits for the device, save one look at the loss every few steps."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gpt.corpus import Corpus
from gpt.model import GPT
from gpt.run import RunConfig
from nexus.optim import FusedAdamW
from nexus.schedules import Schedule
from nexus.training import capture_train_step

LOOK_EVERY = 10  # steps
SMOOTHED = 50  # batches: the loss of a single one is a tenth higher or lower
HISTORY = 10 * LOOK_EVERY  # steps that the device keeps until it is looked at
EACH_STEP = ("losses", "rates", "grad_norms")  # attributes with an entry for each update
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.99)  # a short run: the second moment must follow within a hundred steps


def parameter_groups(model: GPT) -> list[dict[str, Any]]:
    """Weight decay for the matrices, none for the biases and the norms."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def make_optimizer(model: GPT, schedule: Schedule) -> FusedAdamW:
    """The one line that replaces optimizer, scheduler and gradient clipping."""
    return FusedAdamW(parameter_groups(model), lr=schedule, betas=BETAS, max_grad_norm=MAX_GRAD_NORM)


@contextlib.contextmanager
def reproducible(config: RunConfig) -> Iterator[None]:
    """The same inputs give the same bits: the run's number of threads, and on CUDA deterministic kernels."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(config.threads)
    if config.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


class Training:
    """A run of the demo at some step: what a checkpoint holds, and how to go on.

    `losses` (nats a byte, on the device), `rates` and `grad_norms` (as the optimizer's history told them, on the CPU)
    have one entry an update; `before` and `after` are bits a byte on the held-out text.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.config, self.corpus = config, corpus
        self.model = GPT(config.size.model).to(device)
        self.optimizer = make_optimizer(self.model, config.schedule)
        self._history = self.optimizer.history(HISTORY)
        self._step = capture_train_step(self._train_step, self.optimizer)
        self.losses = torch.zeros(config.steps, device=device)
        self.rates = torch.zeros(config.steps, dtype=torch.float64)
        self.grad_norms = torch.zeros(config.steps, dtype=torch.float64)
        self.step = 0
        self.seconds = 0.0
        self.before: float | None = None
        self.after: float | None = None

    @property
    def bytes_a_step(self) -> int:
        """How much text an update learns from; a byte is a token."""
        return self.config.size.batch * self.config.size.model.context

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of update `step`."""
        size = self.config.size
        return self.corpus.batch(self.config.seed, step, size.batch, size.model.context)

    def train(self, stop: Callable[[], bool], look: Callable[[int, float, float], None]) -> None:
        """Train until the last step, or until `stop()`, which is asked between two steps.

        Every `LOOK_EVERY` steps it calls `look(step, loss, rate)` with the mean loss of the last `SMOOTHED` batches.
        """
        started, seconds = time.perf_counter(), self.seconds
        while self.step < self.config.steps and not stop():
            loss = self._step(*self.batch(self.step))  # on CUDA the next step overwrites it
            self.losses[self.step].copy_(loss)
            self.step += 1
            if self.step % LOOK_EVERY == 0 or self.step == self.config.steps:
                self._read_history()
                recent = self.losses[max(0, self.step - SMOOTHED) : self.step]
                look(self.step, float(recent.mean()), float(self.rates[self.step - 1]))
        self._read_history()  # of the steps before `stop`
        self.seconds = seconds + time.perf_counter() - started

    def _train_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """All of an update; on CUDA, one graph."""
        self.optimizer.zero_grad()
        loss = self.model.loss(inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss

    def _read_history(self) -> None:
        """Note what the optimizer did in the steps since the last time."""
        rows = self._history.read()
        self.rates[rows.step] = rows.lr[:, 0]
        self.grad_norms[rows.step] = rows.grad_norm

    @torch.no_grad()
    def held_out_bits(self) -> float:
        """Bits a byte on the held-out text: what a compressor that uses this model would need."""
        size = self.config.size
        batches = self.corpus.held_out_batches(size.held_out_windows, 32, size.model.context)
        nats = sum(self.model.loss(inputs, targets) * len(inputs) for inputs, targets in batches)
        return float(nats) / size.held_out_windows / math.log(2)

    def largest_rate_difference(self) -> float:
        """Between the rates that the device used and the formula in Python, over all steps."""
        formula = self.config.schedule.values(0, self.step)
        return max((abs(a - b) for a, b in zip(self.rates[: self.step].tolist(), formula, strict=True)), default=0.0)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        state = {
            "run": self.config.to_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "before": self.before,
            "after": self.after,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name)[: self.step].clone() for name in EACH_STEP},
            "random": torch.get_rng_state(),
        }
        if self.config.device == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned in a run of equal config."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.before, self.after = state["before"], state["after"]
        for name in EACH_STEP:
            getattr(self, name)[: self.step].copy_(state[name])
        torch.set_rng_state(state["random"].cpu())
        if "random_cuda" in state:
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
