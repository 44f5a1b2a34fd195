"""How a stream is stored in fewer bits than it is computed in, in plain PyTorch. csrc/codec.h says it to kernels.

A value is float32. Whatever is stored of it is decoded to the same value everywhere, and encoded to the same bits.
All tensors here are flat, in the order of the memory; see `flat`.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

SCALE_BLOCK = 128
"""Elements of a moment in 8 bits that share a scale."""

SCALED = (torch.int8, torch.uint8)
"""How a moment is stored that has scales: the signed one, and the one of squares."""

_SMALLEST_SCALES = {torch.int8: 0x10800000, torch.uint8: 0x28000000}
"""The bits of 2**-94 and 2**-47, of which no code is decoded to a subnormal number."""
_INFINITY, _NAN = 0x7F800000, 0x7FC00000
_INV_127, _INV_255 = 1 / 127, 1 / 255  # multiplied in float32, as which they are rounded once

LOW_DTYPES = {24: torch.uint8, 32: torch.int16}
"""Of the low bits of a master weight, by its bits."""


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory: a view that any mode may write to."""
    return tensor.as_strided((tensor.numel(),), (1,)).detach()


def scale_count(numel: int) -> int:
    """How many scales so many elements have."""
    return -(-numel // SCALE_BLOCK)


# Moments. What has a scale is int8, for a signed value, or uint8, for one that is not negative.


def decoded(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The moment that is stored: float32, or float64 as it is."""
    if scale is None:
        return stored if stored.dtype == torch.float64 else stored.float()
    largest = scale.repeat_interleave(SCALE_BLOCK)[: len(stored)]
    if stored.dtype == torch.int8:
        root = stored.float() * _INV_127
        return root * root.abs() * largest
    return ((stored.float() * _INV_255).square() * largest).square()


def encoded(moment: Tensor, dtype: torch.dtype, chance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """What is stored of a moment as `dtype`, and its scales if it has any.

    Args:
        moment: float32, or float64 to be stored as it is.
        dtype: `torch.int8` or `torch.uint8`, bfloat16, or the moment's own.
        chance: int64 from 0 to 65535, one an element, to round up or down by; None: to nearest.
    """
    if dtype not in SCALED:
        stored = moment.to(dtype) if chance is None or dtype != torch.bfloat16 else bfloat16_by_chance(moment, chance)
        return stored, None
    most = 127 if dtype == torch.int8 else 255
    magnitude = (moment if dtype == torch.int8 else root(moment)).abs()
    scale = _scales(magnitude, dtype)
    squared = torch.full_like(scale, most * most) / scale
    squared = (_bits(squared) + 1).view(torch.float32)  # so that the largest has all steps at least
    steps = root(magnitude * squared.repeat_interleave(SCALE_BLOCK)[: len(moment)])
    steps = steps + (128.5 if chance is None else 128.0 + chance.float() * 2.0**-16)
    code = torch.where(steps < 128.0 + most, steps, 128.0 + most).int() - 128  # all of them where it is NaN
    code = torch.where(moment < 0.0, -code, code) if dtype == torch.int8 else code.clamp(min=2)
    return code.to(dtype), scale


def root(value: Tensor) -> Tensor:
    """The square root, rounded once, in a new tensor.

    torch's own float32 root may be off by one in its last place: this is NumPy's where that is there, else float64's.
    """
    numpy = _numpy()
    plain = value.dtype == torch.float32 and value.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()
    if numpy is None or not plain:
        return value.double().sqrt().to(value.dtype)
    result = value.clone()  # memory that NumPy has seen can no longer be resized
    array = result.numpy()
    with numpy.errstate(invalid="ignore"):
        numpy.sqrt(array, out=array)
    return result


@functools.cache
def _numpy() -> Any:
    """NumPy, if torch can use it here."""
    try:
        torch.empty(0, device="cpu").numpy()
        return importlib.import_module("numpy")
    except (ImportError, RuntimeError):
        return None


def _bits(value: Tensor) -> Tensor:
    return value.view(torch.int32)


def _scales(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest of each block, at least the smallest scale; of one with a NaN, NaN."""
    padded = torch.zeros(scale_count(len(magnitude)) * SCALE_BLOCK, dtype=torch.int32, device=magnitude.device)
    padded[: len(magnitude)] = _bits(magnitude)
    bits = padded.view(-1, SCALE_BLOCK).amax(1) if len(magnitude) else padded
    bits = bits.clamp(min=_SMALLEST_SCALES[dtype])
    return torch.where(bits > _INFINITY, _NAN, bits).view(torch.float32)


# The parameter: bfloat16 that is the rounded half of a float32 master weight.


def master(param: Tensor, low: Tensor) -> Tensor:
    """The float32 master weight, of which `param` (bfloat16) is the upper half and `low` what its dtype says."""
    upper = _halves(param)
    width = 16 if low.dtype == torch.int16 else 8
    lower = low.long() & ((1 << width) - 1)
    below = lower >> (width - 1)  # the weight is smaller than the parameter, rounded up
    # Beside a zero that somebody has written over a parameter, such bits would make a NaN.
    below, lower = (torch.where((upper & 0x7FFF == 0) & (below == 1), 0, each) for each in (below, lower))
    return _from_bits((((upper - below) << width) | lower) << (16 - width))


def split(value: Tensor, low_dtype: torch.dtype, chance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The bfloat16 half of a master weight, rounded with ties away from zero, and the low bits beside it."""
    bits = _bits_to_round(value)
    if low_dtype == torch.int16:
        low = bits & 0xFFFF
        upper = (bits >> 16) + (low >> 15)
    else:
        kept = (bits + (0x80 if chance is None else chance >> 8)) >> 8
        low = kept & 0xFF
        upper = (kept >> 8) + (low >> 7)
    return _from_halves(upper), low.to(low_dtype)


def low_bits(value: Tensor, param: Tensor, low_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The low bits with which `param` is nearest to a master weight, and whether it is that weight rounded."""
    offset = (_bits(value).long() & 0xFFFFFFFF) - (_halves(param) << 16)
    same = (offset.abs() <= 0x8000) | (value.isnan() & param.isnan())  # to even, too, as torch rounds
    offset = torch.where(same & ~value.isnan(), offset, 0)
    if low_dtype == torch.int16:
        return offset.clamp(max=0x7FFF).to(low_dtype), same
    return (((offset + 0x80) >> 8).clamp(-0x80, 0x7F) & 0xFF).to(low_dtype), same


def bfloat16_by_chance(value: Tensor, chance: Tensor) -> Tensor:
    """Rounded up or down, in proportion to how near each is."""
    return _from_halves((_bits_to_round(value) + chance) >> 16)


def _bits_to_round(value: Tensor) -> Tensor:
    """As numbers from 0 on; of NaN, those that stay a NaN's."""
    return torch.where(value.isnan(), _NAN, _bits(value).long() & 0xFFFFFFFF)


def _halves(value: Tensor) -> Tensor:
    return value.view(torch.int16).long() & 0xFFFF


def _from_halves(bits: Tensor) -> Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)  # modulo 2**16


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


# Chance.


class Chance(NamedTuple):
    """Where the chance of one parameter's update comes from: Philox4x32-7 (Salmon et al. 2011, SC '11)."""

    seed: int
    ordinal: int  # of the parameter in the optimizer
    step: Tensor  # the parameter's own count of updates, with this one
    first: int  # place of its first element in the whole tensor

    def of(self, numel: int) -> Tensor:
        """int64 from 0 to 65535, one for each of `numel` elements, by which all its moments are rounded.

        A counter serves eight elements of the whole tensor, so a shard's are those of the whole.
        """
        begin = self.first // 8
        groups = torch.arange(begin, (self.first + numel + 7) // 8, device=self.step.device)
        step = self.step.to(torch.int64) & 0xFFFFFFFF
        counter = [
            groups & 0xFFFFFFFF,
            torch.full_like(groups, self.ordinal & 0xFFFFFFFF),
            groups >> 32,
            step.expand_as(groups),
        ]
        words = torch.stack(philox(counter, (self.seed & 0xFFFFFFFF, (self.seed >> 32) & 0xFFFFFFFF)), dim=1)
        halves = torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()
        return halves[self.first - 8 * begin :][:numel]


def swapped(chance: Tensor) -> Tensor:
    """What rounds the parameter: the same two bytes in the other order, which say next to nothing of the first."""
    return (chance >> 8) | (chance & 0xFF) << 8


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four random words of 32 bits for each counter of four; all int64."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(7):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2**64
        a, b = (second >> 32 & 0xFFFFFFFF) ^ b ^ k0, second & 0xFFFFFFFF
        c, d = (first >> 32 & 0xFFFFFFFF) ^ d ^ k1, first & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]
