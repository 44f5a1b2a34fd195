"""A ViT and images, small enough for the scripts beside it: they differ, and this does not."""

import torch
from torch import Tensor, nn

CLASSES = 4


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 32, heads: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, width, kernel_size=4, stride=4)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of images (batch, 1, 16, 16)."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def gratings(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes (count, 1, 16, 16) and the class of their direction (count,)."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    angle = (labels * torch.pi / CLASSES)[:, None, None]
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    phase = 2 * torch.pi * torch.rand(count, 1, 1, generator=random)
    stripes = torch.sin(1.2 * (x * angle.cos() + y * angle.sin()) + phase)
    return (stripes + 1.5 * torch.randn(count, 16, 16, generator=random)).unsqueeze(1), labels
