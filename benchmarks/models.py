"""The models whose training steps are timed, and what they learn: made up on the spot, and learnable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from gpt.model import GPT, Block, GPTConfig
from gpt.run import Size
from torch import Tensor, nn

from benchmarks.cases import CUDA
from benchmarks.training_cases import DEMO_GPT, MLP, TrainingCase

BATCHES = 4  # different ones, over and over

MLP_BATCH, MLP_WIDTHS = 64, (784, 256, 10)

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class GPT2Config(GPTConfig):
    """That of the smallest GPT-2."""

    layers: int = 12
    heads: int = 12
    width: int = 768
    context: int = 1024
    vocabulary: int = 50257


class GPT2(nn.Module):
    """Radford et al. 2019: learned positions, biases, the output tied to the embedding; without dropout."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocabulary) of the token after each of `tokens` (batch, length)."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


def make_model(case: TrainingCase, device: torch.device) -> nn.Module:
    """The same at every call, parameters included."""
    with torch.random.fork_rng([device] if device.type == CUDA else []), device:
        torch.manual_seed(0)
        if case.model == MLP:
            wide, hidden, classes = MLP_WIDTHS
            return nn.Sequential(nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, classes))
        if case.model == DEMO_GPT:
            return GPT(Size().model)
        return GPT2(GPT2Config())


def make_batches(case: TrainingCase, device: torch.device) -> list[Batch]:
    """Inputs and targets on the device, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(BATCHES):
        if case.model == MLP:
            inputs = torch.randn(MLP_BATCH, MLP_WIDTHS[0], generator=generator)
            batches.append((inputs, inputs[:, : MLP_WIDTHS[-1]].argmax(1)))
            continue
        rows, length, vocabulary = _token_sizes(case, device)
        starts = torch.randint(vocabulary, (rows, 1), generator=generator)
        tokens = (starts + 3 * torch.arange(length + 1)) % vocabulary
        batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return [(inputs.to(device), targets.to(device)) for inputs, targets in batches]


def _token_sizes(case: TrainingCase, device: torch.device) -> tuple[int, int, int]:
    """Rows and length of a batch, and the vocabulary."""
    if case.model == DEMO_GPT:
        size = Size()
        return size.batch, size.model.context, 256
    config = GPT2Config()
    return (8, config.context, config.vocabulary) if device.type == CUDA else (1, 128, config.vocabulary)


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
