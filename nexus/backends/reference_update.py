"""The update in plain PyTorch, beside the paper: of many small tensors at once, and of large ones bit by bit.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; AMSGrad: Reddi et al. 2018, arXiv:1904.09237.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.backends import codecs, sharding
from nexus.backends.interface import RATES, TensorEntry

STRETCH = {"cpu": 1 << 16}
"""Elements that are updated at once, by type of device: on the CPU, what stays in a core's cache."""
LONGEST_STRETCH = 1 << 24
SMALL = 1 << 15
"""Tensors with fewer elements are updated together: they cost more by the call than by the element."""

_PER_ELEMENT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average", "master_low")
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale", "max_exp_avg_sq_scale")


class Coefficients(NamedTuple):
    """What the update needs beside the streams, as csrc/adamw.h has it: each one number, or one for each element."""

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


_OF_GROUP = Coefficients._fields.index("step_size")  # so many of them


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
    """Elements that are updated together. Each stream is flat, in one piece or in one for each of several tensors."""

    streams: dict[str, list[Tensor]]  # of the parameter, `"param"`, and of its state
    sizes: list[int]  # of the pieces
    skip: Tensor | None  # whether all stays as it is; None: no
    stochastic_rounding: bool = False
    chance: codecs.Chance | None = None  # of one piece

    def weight(self) -> Tensor:
        """In the type of the arithmetic, to be overwritten."""
        if "master_low" in self.streams:
            return codecs.master(self._read("param"), self._read("master_low"))
        return self.moment("param")

    def put_weight(self, value: Tensor) -> None:
        """Store it."""
        if "master_low" in self.streams:
            dtype = self.streams["master_low"][0].dtype
            by_chance = self.stochastic_rounding and dtype == torch.uint8
            upper, lower = codecs.split(value, dtype, codecs.swapped(self._numbers) if by_chance else None)
            self._write("master_low", lower)
        else:
            dtype = self.streams["param"][0].dtype
            by_chance = self.stochastic_rounding and dtype == torch.bfloat16
            upper, _ = codecs.encoded(value, dtype, codecs.swapped(self._numbers) if by_chance else None)
        self._write("param", upper)

    def moment(self, name: str) -> Tensor:
        """One of the moments or the average, decoded, to be overwritten."""
        stored, scale = self._read(name), f"{name}_scale"
        value = codecs.decoded(stored, self._read(scale) if scale in self.streams else None)
        return value.clone() if value is stored and self.skip is not None else value

    def put_moment(self, name: str, value: Tensor) -> None:
        """Encode and store it."""
        dtype = self.streams[name][0].dtype
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
        assert self.chance is not None
        return self.chance.of(self.sizes[0])

    def _read(self, name: str) -> Tensor:
        pieces = self.streams[name]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _write(self, name: str, value: Tensor) -> None:
        pieces = self.streams[name]
        if value is pieces[0]:  # overwritten already
            return
        if self.skip is not None:
            value = torch.where(self.skip, self._read(name), value)
        if len(pieces) == 1:
            pieces[0].copy_(value)
        else:
            torch._foreach_copy_(pieces, value.split_with_sizes(self.sizes))


class Share:
    """Of the tensors of a device with a gradient, one, or many small ones: what their updates have in common.

    Args:
        entries: each with its place among the tensors of the device.
        seed: of stochastic rounding.
        same_count: whether all have had as many updates, and with the same betas.
    """

    def __init__(self, entries: list[tuple[int, TensorEntry]], seed: int, same_count: bool) -> None:
        self._entries = [entry for _, entry in entries]
        self._seed = seed
        states = [entry.state for entry in self._entries if entry.state is not None]
        self._streams: dict[str, list[Tensor]] = {}
        for name in (*_PER_ELEMENT, *_SCALES):
            pieces = [getattr(state, name) for state in states]
            if pieces[0] is not None:
                self._streams[name] = [codecs.flat(piece) for piece in pieces]
        first = self._entries[0].param
        self._sizes = [entry.param.numel() for entry in self._entries]
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32  # of the arithmetic
        self._stretch = stretch_on(first.device)
        self._place = entries[0][0]
        same_group = len({entry.group for entry in self._entries}) == 1
        self._same = (len(Coefficients._fields) if same_count else _OF_GROUP) if same_group else 0
        if self._same < len(Coefficients._fields):  # of each element, the place of its tensor
            places = torch.tensor([place for place, _ in entries], dtype=torch.int32, device="cpu")
            owners = places.repeat_interleave(torch.tensor(self._sizes, device="cpu"))
            self._owners = owners.to(first.device)

    def gradients(self) -> list[Tensor]:
        """What they have now, in stretches."""
        if len(self._entries) > 1:
            grads = [entry.original.grad for entry in self._entries]
            return [torch._C._nn.flatten_dense_tensors([grad for grad in grads if grad is not None])]
        grad = self._entries[0].grad
        assert grad is not None
        return list(torch.split(codecs.flat(grad), self._stretch))

    def update(self, gradients: list[Tensor], table: Tensor, t: Tensor, skip: Tensor | None) -> None:
        """Update all; `table` has the coefficients of each tensor of the device, `t` the counts of their updates."""
        numbers = list(table[:, self._place].unbind())
        for index in range(self._same, len(numbers)):
            numbers[index] = table[index].index_select(0, self._owners)
        c = Coefficients(*numbers)
        for block, grad in zip(self._blocks(t[self._place], skip), gradients, strict=True):
            update(block, grad, c)

    def _blocks(self, t: Tensor, skip: Tensor | None) -> Iterator[Block]:
        # Of the parameters no view is kept, so that memory which they leave is freed.
        if len(self._entries) > 1:
            params = [entry.original for entry in self._entries]
            flat = [param if param.dim() == 1 else param.view(-1) for param in params]
            yield Block({"param": flat, **self._streams}, self._sizes, skip)
            return
        (entry,) = self._entries
        whole = {"param": [codecs.flat(entry.param)], **self._streams}
        if self._sizes[0] <= self._stretch:
            chance = codecs.Chance(self._seed, entry.ordinal, t, entry.first)
            yield Block(whole, self._sizes, skip, entry.stochastic_rounding, chance)
            return
        scales_each = self._stretch // codecs.SCALE_BLOCK
        cut = {
            name: torch.split(pieces[0], scales_each if name in _SCALES else self._stretch)
            for name, pieces in whole.items()
        }
        for index, param in enumerate(cut["param"]):
            streams = {name: [pieces[index].detach()] for name, pieces in cut.items()}  # as codecs.flat does
            first = entry.first + index * self._stretch
            chance = codecs.Chance(self._seed, entry.ordinal, t, first)
            yield Block(streams, [len(param)], skip, entry.stochastic_rounding, chance)


def stretch_on(device: torch.device) -> int:
    """How many elements are updated at once."""
    return STRETCH.get(device.type, LONGEST_STRETCH)


def shares(entries: list[TensorEntry], seed: int, device: torch.device) -> list[Share]:
    """Those of some entries that have gradients, in which small tensors that are stored alike are together."""
    reads_counts = device.type == "cpu" and not torch._C._len_torch_dispatch_stack()  # elsewhere it would wait
    alike: dict[object, list[tuple[int, TensorEntry]]] = {}
    filled: dict[object, int] = {}  # elements so far
    for place, entry in enumerate(entries):
        kind, numel = _likeness(entry, reads_counts), entry.param.numel()
        if kind is None or numel >= SMALL:
            alike[place] = [(place, entry)]
            continue
        filled[kind] = filled.get(kind, 0) + numel
        alike.setdefault((kind, filled[kind] // stretch_on(device)), []).append((place, entry))
    return [Share(each, seed, reads_counts or len(each) == 1) for each in alike.values()]


def _likeness(entry: TensorEntry, with_count: bool) -> object:
    """Equal for two tensors that may be updated together; None for what is updated by itself, as it is rounded."""
    state, param = entry.state, entry.original
    assert state is not None
    if entry.staged or entry.stochastic_rounding or not param.is_contiguous():
        return None
    if sharding.is_spread(param) or param.is_inference():
        return None
    streams = {name: getattr(state, name) for name in (*_PER_ELEMENT, *_SCALES)}
    dtypes = {name: stream.dtype for name, stream in streams.items() if stream is not None}
    if not set(dtypes.values()) <= {torch.float32, torch.float64}:
        return None
    counts: list[float] = []
    if with_count:
        counts = [float(state.step), *([] if state.beta_products is None else state.beta_products.tolist())]
    return (*counts, param.dtype, *dtypes.items())
