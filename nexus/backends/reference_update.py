"""The update in plain PyTorch, beside the paper: tensor by tensor, in stretches that fit a cache.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; AMSGrad: Reddi et al. 2018, arXiv:1904.09237.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.backends import codecs
from nexus.backends.interface import RATES, TensorEntry

STRETCH = {"cpu": 1 << 16}
"""Elements that are updated at once, by type of device: on the CPU, what stays in a core's cache."""
LONGEST_STRETCH = 1 << 24

_PER_ELEMENT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average", "master_low")
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq_scale")


class Coefficients(NamedTuple):
    """What the update needs beside the streams, as csrc/adamw.h has it: each one number."""

    # One for all tensors of a group:
    grad_multiplier: Tensor  # clip coefficient / gradient scale; negative to maximize
    decay: Tensor  # lr * weight_decay
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    eps: Tensor
    # By the count of a tensor's updates:
    step_size: Tensor  # lr / (1 - product of every beta1)
    inv_sqrt_bias2: Tensor  # 1 / sqrt(1 - product of every beta2)
    average_weight: Tensor  # of the new parameter in its average


def update(block: Block, grad: Tensor, c: Coefficients) -> None:
    """Update the elements of a block. What ends in an underscore overwrites a stream, or what is needed no more."""
    weight, m, v = block.weight(), block.moment("exp_avg"), block.moment("exp_avg_sq")
    dtype = weight.dtype  # of the arithmetic
    g = grad.to(dtype) * c.grad_multiplier
    m.add_((g - m).mul_(c.one_minus_beta1))
    v.mul_(c.beta2).add_((c.one_minus_beta2 * g).mul_(g))
    largest_v = v
    if "max_exp_avg_sq" in block.streams:
        largest_v = torch.maximum(block.moment("max_exp_avg_sq"), v)
        block.put_moment("max_exp_avg_sq", largest_v)
    denominator = codecs.root(largest_v).mul_(c.inv_sqrt_bias2).add_(c.eps)
    # Not (1 - decay) * weight: rounded to float32, that factor is off the same way in every step. An infinite
    # parameter stays what it is.
    decayed = weight.nan_to_num(0.0, 0.0, 0.0).mul_(c.decay)
    weight.sub_(decayed.addcdiv_(c.step_size * m, denominator))
    block.put_weight(weight)
    if "average" in block.streams:
        average = block.moment("average")
        moved = average + c.average_weight * (weight - average)
        block.put_moment("average", torch.where(c.average_weight == 1.0, weight, moved))
    block.put_moment("exp_avg", m)
    block.put_moment("exp_avg_sq", v)


def coefficients(rates: Tensor, multiplier: Tensor, t: Tensor, products: tuple[Tensor, Tensor]) -> Tensor:
    """The `Coefficients` of each tensor, in float64: (9, tensors).

    Args:
        rates: `RATES` by tensor.
        multiplier: of its gradient.
        t: the count of its updates, with this one.
        products: of the beta1 and of the beta2 of all of these.
    """
    rate = dict(zip(RATES, rates.unbind(), strict=True))
    return torch.stack(
        Coefficients(
            grad_multiplier=multiplier,
            decay=rate["lr"] * rate["weight_decay"],
            one_minus_beta1=1.0 - rate["beta1"],
            beta2=rate["beta2"],
            one_minus_beta2=1.0 - rate["beta2"],
            eps=rate["eps"],
            step_size=rate["lr"] / (1.0 - products[0]),
            inv_sqrt_bias2=1.0 / (1.0 - products[1]).sqrt(),
            # A parameter's first update copies it, as torch.optim.swa_utils.AveragedModel does.
            average_weight=torch.where(t == 1.0, 1.0, 1.0 - rate["average_decay"]),
        )
    )


@dataclass(eq=False)
class Block:
    """Elements of one tensor that are updated at once."""

    streams: dict[str, Tensor]  # of the parameter, `"param"`, and of its state; flat
    skip: Tensor | None  # whether all stays as it is; None: no
    stochastic_rounding: bool
    chance: codecs.Chance

    def weight(self) -> Tensor:
        """In the type of the arithmetic, to be overwritten."""
        if "master_low" in self.streams:
            return codecs.master(self.streams["param"], self.streams["master_low"])
        return self.moment("param")

    def put_weight(self, value: Tensor) -> None:
        """Store it."""
        if "master_low" in self.streams:
            dtype = self.streams["master_low"].dtype
            by_chance = self.stochastic_rounding and dtype == torch.uint8
            upper, lower = codecs.split(value, dtype, codecs.swapped(self._numbers) if by_chance else None)
            self._write("master_low", lower)
        else:
            dtype = self.streams["param"].dtype
            by_chance = self.stochastic_rounding and dtype == torch.bfloat16
            upper, _ = codecs.encoded(value, dtype, codecs.swapped(self._numbers) if by_chance else None)
        self._write("param", upper)

    def moment(self, name: str) -> Tensor:
        """One of the moments or the average, decoded, to be overwritten."""
        stored = self.streams[name]
        value = codecs.decoded(stored, self.streams.get(f"{name}_scale"))
        return value.clone() if value is stored and self.skip is not None else value

    def put_moment(self, name: str, value: Tensor) -> None:
        """Encode and store it."""
        dtype = self.streams[name].dtype
        # To nearest, an average of squares would follow no small change (in bfloat16 with a beta2 above 0.996), and
        # a first moment in 8 bits would not come to rest, and move the weight for ever, where gradients are 0.
        frozen = dtype in codecs.SCALED or (dtype == torch.bfloat16 and name != "exp_avg")
        by_chance = frozen or (self.stochastic_rounding and dtype == torch.bfloat16)
        codes, scale = codecs.encoded(value, dtype, self._numbers if by_chance else None)
        self._write(name, codes)
        if scale is not None:
            self._write(f"{name}_scale", scale)

    @cached_property
    def _numbers(self) -> Tensor:
        return self.chance.of(len(self.streams["param"]))

    def _write(self, name: str, value: Tensor) -> None:
        stored = self.streams[name]
        if value is not stored:  # which is overwritten already
            stored.copy_(value if self.skip is None else torch.where(self.skip, stored, value))


class Share:
    """What the updates of one tensor have in common.

    Args:
        entry: of the tensor.
        place: among the tensors of the device.
        seed: of stochastic rounding.
    """

    def __init__(self, entry: TensorEntry, place: int, seed: int) -> None:
        self._entry, self._place, self._seed = entry, place, seed
        streams = {name: getattr(entry.state, name) for name in (*_PER_ELEMENT, *_SCALES)}
        self._streams = {name: codecs.flat(stream) for name, stream in streams.items() if stream is not None}
        param = entry.param
        self.dtype = torch.float64 if param.dtype == torch.float64 else torch.float32  # of the arithmetic
        self._stretch = STRETCH.get(param.device.type, LONGEST_STRETCH)

    def gradients(self) -> list[Tensor]:
        """What the tensor has now, in stretches."""
        grad = self._entry.grad
        assert grad is not None
        return list(torch.split(codecs.flat(grad), self._stretch))

    def update(self, gradients: list[Tensor], table: Tensor, t: Tensor, skip: Tensor | None) -> None:
        """Update all; `table` has the coefficients of each tensor of the device, `t` the counts of their updates."""
        c = Coefficients(*table[:, self._place].unbind())
        for block, grad in zip(self._blocks(t[self._place], skip), gradients, strict=True):
            update(block, grad, c)

    def _blocks(self, t: Tensor, skip: Tensor | None) -> Iterator[Block]:
        entry = self._entry
        # Of the parameter no view is kept, so that memory which it leaves is freed.
        whole = {"param": codecs.flat(entry.param), **self._streams}
        scales_each = self._stretch // codecs.SCALE_BLOCK
        cut = {
            name: torch.split(stream, scales_each if name in _SCALES else self._stretch)
            for name, stream in whole.items()
        }
        for index in range(len(cut["param"])):
            streams = {name: pieces[index].detach() for name, pieces in cut.items()}  # as codecs.flat does
            first = entry.first + index * self._stretch
            chance = codecs.Chance(self._seed, entry.ordinal, t, first)
            yield Block(streams, skip, entry.stochastic_rounding, chance)
