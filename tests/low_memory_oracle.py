"""Low-memory state in numpy: how a float32 value is stored, and an AdamW step of a tensor whose state is stored so.

Written from the formulas alone, to be read beside them. All values are flat, in the order of the memory. float32
arithmetic is numpy's, which contracts nothing; bfloat16 is uint16, its bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.generic]
F = np.float32
SCALE_BLOCK = 128
FEW = 4_096  # tensors of fewer elements keep float32 moments
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SMALLEST_SCALES = {127: F(2.0**-94), 255: F(2.0**-47)}  # by the largest code


def quiet() -> np.errstate:
    """Infinities and NaNs are values like others here."""
    return np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")


def bits_of(x: Array) -> Array:
    return np.ascontiguousarray(x, dtype=F).view(np.uint32).astype(np.int64)


def from_bits(bits: Array) -> Array:
    return (bits & 0xFFFFFFFF).astype(np.uint32).view(F)


# Chance: Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), one counter for eight
# elements, whose words are shared out in halves. Parameters take the halves with their bytes swapped.


def philox(counter: Array, key: tuple[int, int]) -> Array:
    """Four words of 32 bits for each row of four."""
    a, b, c, d = counter.astype(np.uint64).T
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(7):
        key_a, key_b = (
            np.uint64((k + i * w) & 0xFFFFFFFF) for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)
        )
        first, second = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (second >> shift) ^ b ^ key_a, second & low, (first >> shift) ^ d ^ key_b, first & low
    return np.stack([a, b, c, d], axis=1)


@dataclass(frozen=True)
class Chance:
    """Of one step of a tensor: 16 bits an element. The first one is element `first` of the whole tensor."""

    seed: int
    ordinal: int
    step: int  # counts this update
    first: int
    numel: int

    def of_moments(self) -> Array:
        element = np.arange(self.first, self.first + self.numel, dtype=np.int64)
        group = element // 8
        counter = np.empty((len(element), 4), dtype=np.int64)
        counter[:, 0] = group & 0xFFFFFFFF
        counter[:, 1] = self.ordinal
        counter[:, 2] = group >> 32
        counter[:, 3] = self.step & 0xFFFFFFFF
        words = philox(counter, (self.seed & 0xFFFFFFFF, self.seed >> 32 & 0xFFFFFFFF)).astype(np.int64)
        place = element % 8
        return words[np.arange(len(element)), place // 2] >> 16 * (place % 2) & 0xFFFF

    def of_param(self) -> Array:
        return self.of_moments().astype(np.uint16).byteswap().astype(np.int64)


# bfloat16, alone and as the upper half of a master weight.


def read_bf16(stored: Array) -> Array:
    return from_bits(stored.astype(np.int64) << 16)


def nan_kept(x: Array, stored: Array) -> Array:
    """What is stored in 16 bits, but a quiet NaN without a payload where `x` is one."""
    return np.where(np.isnan(x), 0x7FC0, stored).astype(np.uint16)  # modulo 2**16


def bf16(x: Array, chance: Array | None = None) -> Array:
    """To nearest even, or up and down by chance."""
    bits = bits_of(x)
    return nan_kept(x, bits + (0x7FFF + (bits >> 16 & 1) if chance is None else chance) >> 16)


def split(x: Array, master_bits: int, chance: Array | None = None) -> tuple[Array, Array]:
    """A master weight's bfloat16, rounded with ties away from zero, and the low bits beside it."""
    bits = bits_of(x)
    if master_bits == 32:
        low = bits & 0xFFFF
        high = (bits >> 16) + (low >> 15)
    else:
        kept = bits + (0x80 if chance is None else chance >> 8) >> 8
        low = kept & 0xFF
        high = (kept >> 8) + (low >> 7)
    dtype = np.int16 if master_bits == 32 else np.uint8
    return nan_kept(x, high), np.where(np.isnan(x), 0, low).astype(dtype)


def joined(high: Array, low: Array) -> Array:
    width = 8 * low.dtype.itemsize
    high, low = high.astype(np.int64), low.astype(np.int64) & (1 << width) - 1
    is_below = low >> width - 1  # the weight is smaller than the parameter
    # Beside a zero that the user has written over a parameter, they would be a NaN's.
    is_stale = (high & 0x7FFF == 0) & (is_below == 1)
    return from_bits(np.where(is_stale, high << width, high - is_below << width | low) << 16 - width)


# Moments in 8 bits: steps to the root of the block's largest magnitude, and of second moments, to that of the root.


def in_blocks(x: Array) -> Array:
    padded = np.zeros((len(x) + SCALE_BLOCK - 1) // SCALE_BLOCK * SCALE_BLOCK, dtype=x.dtype)
    padded[: len(x)] = x
    return padded.reshape(-1, SCALE_BLOCK)


def spread(scale: Array, numel: int) -> Array:
    return np.repeat(scale, SCALE_BLOCK)[:numel]


def encode(x: Array, chance: Array | None, least: int, most: int) -> tuple[Array, Array]:
    """The codes of magnitudes, and the scale of each block: its largest magnitude, NaN where there is one."""
    largest = in_blocks(bits_of(x)).max(axis=1, initial=int(bits_of(SMALLEST_SCALES[most])[0]))
    scale = from_bits(np.where(largest > 0x7F800000, 0x7FC00000, largest))
    square = F(most * most)
    factor = from_bits(bits_of(square / scale) + 1)  # so that the largest has all steps at least
    steps = np.sqrt(x * spread(factor, len(x)))
    u = np.full(len(x), 0x8000) if chance is None else chance
    sums = steps + (F(128.0) + u.astype(F) * F(2.0**-16))
    sums = np.where(sums < F(128 + most), sums, F(128 + most))  # of NaN, too
    return np.clip(np.trunc(sums).astype(np.int64) - 128, least, most), scale


def encode_int8(x: Array, chance: Array | None = None) -> tuple[Array, Array]:
    code, scale = encode(np.abs(x), chance, 0, 127)
    return np.where(x < 0, -code, code).astype(np.int8), scale


def decode_int8(code: Array, scale: Array) -> Array:
    q = code.astype(F) * F(1 / 127)
    return q * np.abs(q) * spread(scale, len(code))


def encode_uint8(x: Array, chance: Array | None = None) -> tuple[Array, Array]:
    code, scale = encode(np.abs(np.sqrt(x)), chance, 2, 255)
    return code.astype(np.uint8), scale


def decode_uint8(code: Array, scale: Array) -> Array:
    r = code.astype(F) * F(1 / 255)
    q = r * r * spread(scale, len(code))
    return q * q


# The update.


@dataclass(frozen=True)
class Mode:
    """The dtype of a parameter and the options that say how its state is stored."""

    param: torch.dtype = torch.float32
    master_weight_bits: int | None = None
    exp_avg_dtype: torch.dtype | None = None
    exp_avg_sq_dtype: torch.dtype | None = None
    stochastic_rounding: bool = False
    average: Any = None  # an EMA or a Mean

    def options(self) -> dict[str, object]:
        """For `FusedAdamW`."""
        return {name: value for name, value in vars(self).items() if name != "param"}


@dataclass(frozen=True)
class Settings:
    """Of a step. `grad_multiplier` is what clipping and scaling leave of a gradient, without maximize's sign."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    grad_multiplier: float = 1.0
    average_decay: float = 0.0

    def coefficients(self, t: int) -> tuple[np.float32, ...]:
        """Computed in float64 and rounded once; `t` counts this update."""
        beta1, beta2 = self.betas
        scale = -self.grad_multiplier if self.maximize else self.grad_multiplier
        step_size, inverse_root = self.lr / (1.0 - beta1**t), 1.0 / math.sqrt(1.0 - beta2**t)
        exact = (
            scale,
            self.lr * self.weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            step_size,
            inverse_root,
            self.eps,
        )
        return tuple(map(F, exact))


@dataclass
class Moment:
    """How one is stored."""

    dtype: torch.dtype
    by_chance: bool
    stored: Array
    scale: Array | None = None

    def value(self) -> Array:
        if self.dtype == torch.bfloat16:
            return read_bf16(self.stored)
        if self.scale is None:
            return self.stored.astype(F)
        return (decode_int8 if self.dtype == torch.int8 else decode_uint8)(self.stored, self.scale)

    def store(self, value: Array, chance: Chance) -> None:
        by = chance.of_moments() if self.by_chance else None
        if self.dtype == torch.bfloat16:
            self.stored = bf16(value, by)
        elif self.dtype == torch.int8:
            self.stored, self.scale = encode_int8(value, by)
        elif self.dtype == torch.uint8:
            self.stored, self.scale = encode_uint8(value, by)
        else:
            self.stored = value


@dataclass
class Parameter:
    """One of an optimizer, with its state. `values` are what it holds at first."""

    values: Tensor
    mode: Mode
    ordinal: int = 0
    seed: int = 0
    first: int = 0
    whole: int | None = None  # elements of the whole tensor, of which this may be a shard
    step_count: int = 0
    low: Array | None = None
    moments: list[Moment] = field(default_factory=list)
    average: Moment | None = None

    def __post_init__(self) -> None:
        mode, numel = self.mode, self.values.numel()
        self.param = stored_bits(self.values)
        if mode.master_weight_bits is not None:
            self.low = np.zeros(numel, dtype=np.int16 if mode.master_weight_bits == 32 else np.uint8)
        few = (numel if self.whole is None else self.whole) < FEW
        for name in MOMENTS:
            is_first = name == "exp_avg"
            dtype = (mode.exp_avg_dtype if is_first else mode.exp_avg_sq_dtype) or torch.float32
            dtype = torch.float32 if few else dtype
            # To nearest, small first moments never come to rest, and second moments follow no small change.
            by_chance = mode.stochastic_rounding or dtype.itemsize == 1 or (not is_first and dtype.itemsize == 2)
            self.moments.append(Moment(dtype, by_chance, np.zeros(numel, dtype=F)))
            self.moments[-1].store(np.zeros(numel, dtype=F), self.chance())
        if mode.average is not None:
            narrow = mode.average.dtype == torch.bfloat16 and not few
            self.average = Moment(torch.bfloat16 if narrow else torch.float32, True, np.zeros(numel, dtype=F))
            self.average.store(np.zeros(numel, dtype=F), self.chance())

    def chance(self) -> Chance:
        return Chance(self.seed, self.ordinal, self.step_count, self.first, len(self.param))

    def value(self) -> Array:
        """The parameter in float32, with the low bits of its master weight."""
        if self.low is not None:
            return joined(self.param, self.low)
        return read_bf16(self.param) if self.mode.param == torch.bfloat16 else self.param.astype(F)

    @quiet()
    def step(self, grad: Tensor, settings: Settings) -> None:
        self.step_count += 1
        chance = self.chance()
        multiplier, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_root, eps = (
            settings.coefficients(self.step_count)
        )
        exp_avg, exp_avg_sq, max_exp_avg_sq = self.moments
        g = multiplier * stored_bits(grad.float())
        m, v, param = exp_avg.value(), exp_avg_sq.value(), self.value()
        m = m + one_minus_beta1 * (g - m)
        v = largest = beta2 * v + one_minus_beta2 * g * g
        if settings.amsgrad:
            largest = np.maximum(v, max_exp_avg_sq.value())
            max_exp_avg_sq.store(largest, chance)
        denominator = np.sqrt(largest) * inverse_root + eps
        decayed = np.where(np.isfinite(param), decay * param, F(0.0))
        param = param - (decayed + step_size * m / denominator)
        self.store(param, chance)
        if self.average is not None:
            weight = F(1.0 if self.step_count == 1 else 1.0 - settings.average_decay)
            average = self.average.value()
            self.average.store(param if weight == 1 else average + weight * (param - average), chance)
        exp_avg.store(m, chance)
        exp_avg_sq.store(v, chance)

    def store(self, value: Array, chance: Chance) -> None:
        mode = self.mode
        by = chance.of_param() if mode.stochastic_rounding and mode.master_weight_bits != 32 else None
        if mode.master_weight_bits is not None:
            self.param, self.low = split(value, mode.master_weight_bits, by)
        elif mode.param == torch.bfloat16:
            self.param = bf16(value, by)
        else:
            self.param = value.astype(self.param.dtype)

    def streams(self, amsgrad: bool = False) -> dict[str, Array]:
        """All that is stored, by the names of the optimizer's state, with the parameter as "param"."""
        found: dict[str, Array | None] = {"param": self.param, "master_low": self.low}
        for name, moment in zip(MOMENTS, self.moments, strict=True):
            if amsgrad or name != "max_exp_avg_sq":
                found |= {name: moment.stored, f"{name}_scale": moment.scale}
        found["average"] = None if self.average is None else self.average.stored
        return {name: each for name, each in found.items() if each is not None}


def stored_bits(tensor: Tensor) -> Array:
    """The elements in the order of the memory, bfloat16 as uint16."""
    tensor = tensor.detach()
    flat = tensor.as_strided((tensor.numel(),), (1,)).clone()
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def unequal(found: Array, expected: Array) -> Array:
    """Where two streams differ in a bit; but any NaN is as good as another."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        raise AssertionError(f"{found.dtype} {found.shape}, not {expected.dtype} {expected.shape}")
    nan = [np.isnan(read_bf16(each) if each.dtype == np.uint16 else each) for each in (found, expected)]
    integer = {1: np.uint8, 2: np.uint16, 4: np.uint32}[found.dtype.itemsize]
    return (found.view(integer) != expected.view(integer)) & ~(nan[0] & nan[1])
