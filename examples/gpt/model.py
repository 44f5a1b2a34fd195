"""A GPT small enough to learn something on two cores in two minutes, and plain enough to read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes


@dataclass(frozen=True)
class GPTConfig:
    """Sizes; about a million parameters by default."""

    layers: int = 5
    heads: int = 4
    width: int = 128
    context: int = 128


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864): turn each pair of features by an angle.

    `x` is (batch, heads, length, features), `rotation` (2, length, features / 2): cosines and sines.
    """
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    """Pre-LN attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.attention_out = nn.Linear(config.width, config.width)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, 4 * config.width)
        self.mlp_out = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, rotation: Tensor | None = None) -> Tensor:
        """The residual stream `x` (batch, length, width) after this block; `rotation` gives rotary positions."""
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, heads, length, width / heads)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        mlp: Tensor = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh"))
        return x + mlp


class GPT(nn.Module):
    """A byte-level language model: pre-LN blocks, rotary positions, the output tied to the embedding."""

    def __init__(self, config: GPTConfig, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary, config.width)
        features = config.width // config.heads
        frequencies = 10_000 ** (-torch.arange(0, features, 2) / features)
        angles = torch.arange(config.context)[:, None] * frequencies
        self.rotation: Tensor
        self.register_buffer("rotation", torch.stack((angles.cos(), angles.sin())), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            std = 0.02
            if name.endswith("_out.weight"):  # keeps the residual stream's scale independent of depth
                std /= math.sqrt(2 * config.layers)
            nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, 256) of the byte after each of `tokens` (batch, length)."""
        x, rotation = self.embedding(tokens), self.rotation[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x, rotation)
        return F.linear(self.norm(x), self.embedding.weight)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a byte."""
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, seed: int, temperature: float = 0.8) -> bytes:
        """`prompt` and `length` more bytes, drawn by the model."""
        device = self.embedding.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device draws alike
        text = list(prompt)
        for _ in range(length):
            tokens = torch.tensor([text[-self.config.context :]], device=device)
            probabilities = torch.softmax(self(tokens)[0, -1].cpu() / temperature, dim=0)
            text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return bytes(text)
