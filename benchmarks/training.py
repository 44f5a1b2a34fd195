"""Training loops over models of their own with the same parameters: each call is one step on the next batch.

The models, and what they learn, are made up on the spot; they are learnable.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpt.model import GPT, VOCABULARY, GPTConfig
from gpt.run import Size
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from benchmarks import cases
from benchmarks.cases import CAPTURED, CUDA, DEMO_GPT, GPT2, MLP, TORCH_GRAPH, TrainingCase
from benchmarks.peers import MAX_GRAD_NORM, PEAK_LR, PEERS, SCHEDULE, warmup
from benchmarks.timing import PROCESSOR, Device
from nexus.optim import FusedAdamW
from nexus.training import capture_train_step

BATCHES = 4  # different ones, over and over
MLP_BATCH, MLP_WIDTHS = 64, (784, 256, 10)
SIZES = {DEMO_GPT: Size(), GPT2: Size(GPTConfig(layers=12, heads=12, width=768, context=1024), batch=8)}
VOCABULARIES = {DEMO_GPT: VOCABULARY, GPT2: 50257}
ON_CPU = {GPT2: (1, 128)}  # rows and length of a batch where the usual one would take too long
LOOPS = {cases.TORCH_LOOP: cases.FOREACH, cases.TORCH_FUSED_LOOP: cases.FUSED, TORCH_GRAPH: cases.CAPTURABLE}
CHECKED_STEPS = 20

Batch = tuple[Tensor, Tensor]
TrainStep = Callable[[Tensor, Tensor], Tensor]


class LearnedPositionsGPT(GPT):
    """The GPT of Radford et al. 2019, without dropout."""

    def __init__(self, config: GPTConfig, vocabulary: int) -> None:
        super().__init__(config, vocabulary)
        self.positions = nn.Embedding(config.context, config.width)
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def make_model(case: TrainingCase, device: Device = PROCESSOR) -> nn.Module:
    """The same at every call, parameters included."""
    with torch.random.fork_rng([device.where] if device.where.type == CUDA else []), device.where:
        torch.manual_seed(0)
        if case.model == MLP:
            wide, hidden, classes = MLP_WIDTHS
            return nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, classes))
        kind = LearnedPositionsGPT if case.model == GPT2 else GPT
        return kind(SIZES[case.model].model, VOCABULARIES[case.model])


def make_batches(case: TrainingCase, device: Device = PROCESSOR) -> list[Batch]:
    """Inputs and targets on the device, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(BATCHES):
        if case.model == MLP:
            inputs = torch.randn(MLP_BATCH, MLP_WIDTHS[0], generator=generator)
            batches.append((inputs, inputs[:, : MLP_WIDTHS[-1]].argmax(1)))
            continue
        size, vocabulary = SIZES[case.model], VOCABULARIES[case.model]
        rows, length = size.batch, size.model.context
        if device.where.type != CUDA:
            rows, length = ON_CPU.get(case.model, (rows, length))
        starts = torch.randint(vocabulary, (rows, 1), generator=generator)
        tokens = (starts + 3 * torch.arange(length + 1)) % vocabulary
        batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return [(inputs.to(device.where), targets.to(device.where)) for inputs, targets in batches]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


class Trainee:
    """A loop at some step; `step` does one, and may be replaced by another way to do it."""

    compared, remark = "losses", ""

    def __init__(self, case: TrainingCase, device: Device) -> None:
        self.model = make_model(case, device)
        self.params = list(self.model.parameters())
        self.backend = ""  # of nexus
        self.losses: list[float] = []  # of the first steps, by `read_losses`
        self.batches = make_batches(case, device)
        self.step: TrainStep
        self._taken = 0
        self._last: Tensor
        autocast = torch.autocast(device.where.type, torch.bfloat16) if case.autocast else None
        self._autocast = autocast or contextlib.nullcontext()

    def call(self) -> Tensor:
        """Train on the next batch. The loss may be overwritten by the next call."""
        batch = self.batches[self._taken % BATCHES]
        self._taken += 1
        self._last = self.step(*batch)
        return self._last

    def update(
        self, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, clips: bool = False
    ) -> Tensor:
        """What every loop does, from zero_grad to the optimizer's step; nexus's `clips` by itself."""
        optimizer.zero_grad()
        with self._autocast:
            loss = loss_of(self.model, inputs, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        if not clips:
            torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        optimizer.step()
        return loss.detach()

    def restore(self) -> None:
        """Nothing: each call computes gradients of its own."""

    def read_losses(self, count: int) -> list[float]:
        """Train until `count` losses are known; to be used from the first step on."""
        while len(self.losses) < count:
            self.losses.append(float(self.call()))
        return self.losses[:count]

    def prepare(self) -> None:
        """The steps whose losses are compared."""
        self.read_losses(CHECKED_STEPS)

    def difference(self, other: Trainee) -> float:
        """How far the losses of the first steps are apart, as a share of the way that the other's goes.

        NaN where the loss has stopped being finite since.
        """
        a, b = self.read_losses(CHECKED_STEPS), other.read_losses(CHECKED_STEPS)
        way = max(b) - min(b)
        if not way or not math.isfinite(float(self._last)):
            return math.nan
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) / way


def nexus(case: TrainingCase, job: str, device: Device = PROCESSOR) -> Trainee:
    """The loop with this package's optimizer; where the job says so, and where there is CUDA, captured."""
    trainee = Trainee(case, device)
    optimizer = FusedAdamW(trainee.params, lr=SCHEDULE, max_grad_norm=MAX_GRAD_NORM)

    def train_step(inputs: Tensor, targets: Tensor) -> Tensor:
        return trainee.update(optimizer, inputs, targets, clips=True)

    trainee.step = capture_train_step(train_step, optimizer) if job == CAPTURED else train_step
    trainee.backend = optimizer.backend
    return trainee


def peer(case: TrainingCase, job: str, name: str, device: Device = PROCESSOR) -> Trainee:
    """The loop that `name` stands for."""
    if name == cases.NEXUS_EAGER:
        return nexus(case, name, device)
    trainee = Trainee(case, device)
    optimizer = PEERS[LOOPS[name]].make([{"params": trainee.params}], device.where)
    if name == TORCH_GRAPH:
        _capture(trainee, optimizer, device)
        return trainee
    scheduler = LambdaLR(optimizer, warmup)

    def train_step(inputs: Tensor, targets: Tensor) -> Tensor:
        loss = trainee.update(optimizer, inputs, targets)
        scheduler.step()
        return loss

    trainee.step = train_step
    return trainee


def _capture(trainee: Trainee, optimizer: torch.optim.Optimizer, device: Device) -> None:
    """As an expert writes it: one graph, static inputs, and a rate that the host fills in before each replay."""
    rate = optimizer.param_groups[0]["lr"]
    static = [tensor.clone() for tensor in trainee.batches[0]]
    completed = 0
    loss = torch.zeros(())

    def set_rate() -> None:
        nonlocal completed
        rate.fill_(PEAK_LR * warmup(completed))
        completed += 1

    def eager_step(inputs: Tensor, targets: Tensor) -> Tensor:
        set_rate()
        return trainee.update(optimizer, inputs, targets)

    def body() -> None:
        nonlocal loss
        loss = trainee.update(optimizer, static[0], static[1])

    trainee.step = eager_step
    replay = device.capture(lambda: trainee.losses.append(float(trainee.call())), body)
    if replay is None:
        raise RuntimeError("there are no graphs on this device")

    def graph_step(inputs: Tensor, targets: Tensor) -> Tensor:
        for place, given in zip(static, (inputs, targets), strict=True):
            place.copy_(given)
        set_rate()
        replay()
        return loss

    trainee.step = graph_step
