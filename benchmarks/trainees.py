"""Training loops over models of their own with the same parameters: each call is one step on the next batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import peers
from benchmarks.cases import CAPTURABLE, FOREACH, FUSED
from benchmarks.models import Batch, loss_of, make_batches, make_model
from benchmarks.peers import PEAK_LR
from benchmarks.timing import Device
from benchmarks.training_cases import CAPTURED, NEXUS_EAGER, TORCH_FUSED_LOOP, TORCH_GRAPH, TORCH_LOOP, TrainingCase
from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training import capture_train_step

WARMUP_STEPS = 10
MAX_GRAD_NORM = 0.5  # below the norm of most steps
SCHEDULE = WSD(WARMUP_STEPS, None, 1, PEAK_LR)

TrainStep = Callable[[Tensor, Tensor], Tensor]


def warmup(step: int) -> float:
    """The factor that `LambdaLR` multiplies `PEAK_LR` by; `SCHEDULE` says the same."""
    return min(1.0, step / WARMUP_STEPS)


class Trainee:
    """A loop at some step."""

    def __init__(self, model: nn.Module, batches: list[Batch], step: TrainStep, backend: str = "") -> None:
        self.model, self.backend = model, backend
        self.losses: list[float] = []  # of the first steps, by `read_losses`
        self._batches, self._step = batches, step
        self._taken = 0

    def call(self) -> Tensor:
        """Train on the next batch. The loss may be overwritten by the next call."""
        batch = self._batches[self._taken % len(self._batches)]
        self._taken += 1
        return self._step(*batch)

    def go_on_with(self, step: TrainStep) -> None:
        """Do the steps from now on in another way."""
        self._step = step

    def read_losses(self, count: int) -> list[float]:
        """Train until `count` losses are known; to be used from the first step on."""
        while len(self.losses) < count:
            self.losses.append(float(self.call()))
        return self.losses[:count]


def nexus(case: TrainingCase, job: str, device: Device) -> Trainee:
    """The loop with this package's optimizer; where the job says so, and where there is CUDA, captured."""
    model = make_model(case, device.where)
    optimizer = FusedAdamW(model.parameters(), lr=SCHEDULE, max_grad_norm=MAX_GRAD_NORM)
    autocast = _autocast(case, device)

    def train_step(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = loss_of(model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    step: TrainStep = capture_train_step(train_step, optimizer) if job == CAPTURED else train_step
    return Trainee(model, make_batches(case, device.where), step, optimizer.backend)


def peer(case: TrainingCase, job: str, name: str, device: Device) -> Trainee:
    """The loop that `name` stands for."""
    if name == NEXUS_EAGER:
        return nexus(case, name, device)
    return _torch_graph(case, device) if name == TORCH_GRAPH else _torch_loop(case, name, device)


def _torch_loop(case: TrainingCase, name: str, device: Device) -> Trainee:
    """As most loops are."""
    model = make_model(case, device.where)
    way = {TORCH_LOOP: FOREACH, TORCH_FUSED_LOOP: FUSED}[name]
    optimizer = peers.PEERS[way].make([{"params": list(model.parameters())}], device.where)
    scheduler = LambdaLR(optimizer, warmup)
    forward_to_update = _forward_to_update(case, model, optimizer, device)

    def train_step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = forward_to_update(inputs, targets)
        scheduler.step()
        return loss

    return Trainee(model, make_batches(case, device.where), train_step)


def _torch_graph(case: TrainingCase, device: Device) -> Trainee:
    """As an expert writes it: one graph, static inputs, and a rate that the host fills in before each replay."""
    model = make_model(case, device.where)
    optimizer = peers.PEERS[CAPTURABLE].make([{"params": list(model.parameters())}], device.where)
    rate = optimizer.param_groups[0]["lr"]
    forward_to_update = _forward_to_update(case, model, optimizer, device)
    batches = make_batches(case, device.where)
    static = tuple(tensor.clone() for tensor in batches[0])
    completed = 0
    loss = torch.zeros(())

    def set_rate() -> None:
        nonlocal completed
        rate.fill_(PEAK_LR * warmup(completed))
        completed += 1

    def eager_step(inputs: Tensor, targets: Tensor) -> Tensor:
        set_rate()
        return forward_to_update(inputs, targets)

    trainee = Trainee(model, batches, eager_step)

    def body() -> None:
        nonlocal loss
        loss = forward_to_update(*static)

    replay = device.capture(lambda: trainee.losses.append(float(trainee.call())), body)
    if replay is None:
        raise RuntimeError("there are no graphs on this device")

    def graph_step(inputs: Tensor, targets: Tensor) -> Tensor:
        for place, given in zip(static, (inputs, targets), strict=True):
            place.copy_(given)
        set_rate()
        replay()
        return loss

    trainee.go_on_with(graph_step)
    return trainee


def _forward_to_update(
    case: TrainingCase, model: nn.Module, optimizer: torch.optim.Optimizer, device: Device
) -> TrainStep:
    autocast, parameters = _autocast(case, device), list(model.parameters())

    def run(inputs: Tensor, targets: Tensor) -> Tensor:
        optimizer.zero_grad()
        with autocast():
            loss = loss_of(model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    return run


def _autocast(case: TrainingCase, device: Device) -> Callable[[], contextlib.AbstractContextManager[object]]:
    if not case.autocast:
        return contextlib.nullcontext
    return lambda: torch.autocast(device.where.type, dtype=torch.bfloat16)
