"""AdamW by torch's own fused kernel: what runs on a CPU where nothing is compiled.

One call updates all tensors of a group. Everything around it, and what that kernel cannot take, is the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nexus.backends import codecs
from nexus.backends.interface import RATES, DevicePlan, GroupSettings, StepState, TensorEntry
from nexus.backends.reference import ReferenceRunner, Work
from nexus.backends.reference_rates import GroupRates, evaluate
from nexus.schedules.curves import Layer, value_of
from nexus.schedules.table import layers_in

__all__ = ["DEVICE_TYPES", "NAME", "TorchRunner", "detail", "evaluate", "runner", "unavailable"]

NAME = "torch"
DEVICE_TYPES = frozenset({"cpu"})
STRETCH = 1 << 20
"""Elements of which copies are made at once: few enough for a cache, and many for the threads to share."""
SMALL = 1 << 17
"""Tensors of fewer elements are copied together: they cost more by the call than by the element."""
SUMMED = 1 << 14
"""Gradients whose squares are added up in float32: their norm is right to within 5e-5, and mostly to 1e-6."""
TINY = 1e-10
"""Norms of gradients below it are summed in float64, since squares of float32 may vanish."""


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """PyTorch is always there."""
    return None


def detail() -> str:
    """In words."""
    return f"CPU, in plain PyTorch: its own fused kernel, {torch.get_num_threads()} threads"


def runner(setting_names: tuple[str, ...]) -> TorchRunner:
    """One for an optimizer."""
    return TorchRunner(setting_names)


class TorchRunner(ReferenceRunner):
    """The reference's, whose work is torch's kernel's where that can do it."""

    def work(self, plan: DevicePlan) -> Work:
        return TorchWork(plan, sums_exactly=bool(self._plan.norm_parts))


class HostRates(GroupRates):
    """Rates whose schedules the oracle evaluates: on the CPU, a table can be read."""

    def __init__(self, groups: list[GroupSettings], state: StepState) -> None:
        super().__init__(groups, state)
        self._read: dict[int, tuple[int, list[Layer]]] = {}  # of a table: the version that was read, and its layers

    def evaluate(self, tables: list[Tensor], clocks: list[Tensor]) -> Tensor:
        values = [value_of(self._layers(table), int(clock)) for table, clock in zip(tables, clocks, strict=True)]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def _layers(self, table: Tensor) -> list[Layer]:
        version, layers = self._read.get(id(table), (-1, []))
        if version != table._version:
            layers = layers_in(table)
            self._read[id(table)] = table._version, layers
        return layers


class TorchWork(Work):
    """A step on the CPU.

    Args:
        plan: of all tensors there.
        sums_exactly: whether all squares are summed in float64, since sums of some are subtracted from that of all.
            They also are beside float64 parameters and what the reference updates, which is to have the bits that it
            has there.
    """

    rates_type = HostRates

    def __init__(self, plan: DevicePlan, sums_exactly: bool) -> None:
        self._sums_exactly = sums_exactly
        self._batches: list[Batch] = []
        super().__init__(plan)

    def take(self, entries: list[TensorEntry]) -> list[TensorEntry]:
        alike: dict[object, list[TensorEntry]] = {}
        for entry in entries:
            alike.setdefault(_likeness(entry), []).append(entry)
        others = alike.pop(None, [])
        self._batches = [Batch(each) for each in alike.values()]
        dtypes = {entry.param.dtype == torch.float64 for entry in entries}
        self._sums_exactly = self._sums_exactly or len(dtypes) > 1 or len(others) > 0
        return others

    def gradients(self) -> list[list[Tensor]]:
        """Of each share, in stretches, and of each batch, whole."""
        return [*super().gradients(), *(batch.gradients() for batch in self._batches)]

    def sum_of_squares(self, gradients: list[list[Tensor]]) -> Tensor:
        others, own = gradients[: len(self._shares)], gradients[len(self._shares) :]
        if own and not self._sums_exactly:  # so all are in batches
            norms = [norm for batch, grads in zip(self._batches, own, strict=True) for norm in batch.norms(grads)]
            total = torch.stack(norms).double().square().sum()
            if TINY**2 < float(total) < math.inf:  # else a square may be out of the range of float32
                return total
        return super().sum_of_squares([*others, *([codecs.flat(grad) for grad in grads] for grads in own)])

    def update(self, gradients: list[list[Tensor]], rates: Tensor, multiplier: Tensor, skip: Tensor | None) -> None:
        if skip is not None and bool(skip):
            return
        others, own = gradients[: len(self._shares)], gradients[len(self._shares) :]
        super().update(others, rates, multiplier, None)
        of_groups = [dict(zip(RATES, each, strict=True)) for each in rates.t().tolist()]
        multipliers = multiplier.tolist()
        for batch, grads in zip(self._batches, own, strict=True):
            batch.update(grads, of_groups[batch.group], multipliers[batch.group])


class Batch:
    """Tensors of a group that are stored alike, which torch's kernel updates.

    It takes copies where gradients are multiplied, by a clip coefficient or for a gradient scaler, and where they or
    parameters have another type than the arithmetic's: of all small tensors at once, of large ones by the stretch.
    """

    def __init__(self, entries: list[TensorEntry]) -> None:
        entries = sorted(entries, key=lambda entry: entry.original.numel() >= SMALL)
        self.group = entries[0].group
        params = [entry.original for entry in entries]
        states = [entry.state for entry in entries if entry.state is not None]
        streams = (
            [state.exp_avg for state in states],
            [state.exp_avg_sq for state in states],
            [state.max_exp_avg_sq for state in states if state.max_exp_avg_sq is not None],
            [state.average for state in states if state.average is not None],
        )
        counts = [state.step.data for state in states]  # so that the version counts what others write
        self._whole = Part(params, [], *streams, counts)
        self._ones = [torch.ones((), dtype=torch.float64, device="cpu")] * len(entries)
        self._dtype = states[0].exp_avg.dtype  # of the arithmetic
        self._small = sum(param.numel() < SMALL for param in params)  # so many of the tensors
        self._has_copies = False  # of this step's gradients

    def gradients(self) -> list[Tensor]:
        """What the tensors have now."""
        self._has_copies = False
        return [grad for grad in (param.grad for param in self._whole.params) if grad is not None]

    def norms(self, grads: list[Tensor]) -> Sequence[Tensor]:
        """Of stretches of the gradients."""
        flat = [self._copied(grads), *map(codecs.flat, grads[self._small :])]
        stretches = [stretch for each in flat for stretch in torch.split(each, SUMMED)]
        return torch._foreach_norm(stretches, 2, dtype=torch.promote_types(grads[0].dtype, self._dtype))

    def update(self, grads: list[Tensor], rates: dict[str, float], multiplier: float) -> None:
        """Update all tensors once, with the rates of their group and a multiplier of their gradients."""
        whole = self._whole._replace(grads=grads)
        torch._foreach_add_(whole.counts, self._ones)
        by, rate = abs(multiplier), {name: rates[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
        options: dict[str, Any] = {**rate, "amsgrad": bool(whole.max_exp_avg_sqs), "maximize": multiplier < 0.0}
        is_plain = by == 1.0 and self._whole.params[0].dtype == grads[0].dtype == self._dtype
        for part in [whole] if is_plain else self._cut(whole, by):
            params = self._converted(part.params)
            moments = part.exp_avgs, part.exp_avg_sqs, part.max_exp_avg_sqs
            torch._fused_adamw_(params, part.grads, *moments, part.counts, **options)
            if part.averages:
                _average(part.averages, params, part.counts, rates["average_decay"])
            if params is not part.params:
                torch._foreach_copy_(part.params, params)
        torch.autograd.graph.increment_version(self._whole.params)  # which torch's kernel does not
        if "_copies" in self.__dict__ and len(self._copies[0]) > STRETCH:
            del self._copies  # or much memory stays taken from step to step

    def _cut(self, whole: Part, by: float) -> Iterator[Part]:
        """Parts whose gradients are of the arithmetic's type, and multiplied."""
        if self._small:
            self._copied(whole.grads).mul_(by)
            yield Part._make(each[: self._small] for each in whole)._replace(grads=self._copies[1])
        for place in range(self._small, len(self._whole.params)):
            *streams, count = (each[place : place + 1] for each in whole)
            cut = [[torch.split(codecs.flat(each), STRETCH) for each in stream] for stream in streams]
            for k in range(len(cut[0][0])):
                part = Part._make([*([pieces[k] for pieces in stream] for stream in cut), count])
                yield part._replace(grads=[grad * by for grad in self._converted(part.grads)])

    def _copied(self, grads: list[Tensor]) -> Tensor:
        """This step's gradients of all small tensors, flat."""
        flat, each = self._copies
        if each and not self._has_copies:
            torch._foreach_copy_(each, grads[: self._small])
            self._has_copies = True
        return flat

    @cached_property
    @torch.inference_mode(False)  # it outlives a mode in which it may be made
    def _copies(self) -> tuple[Tensor, list[Tensor]]:
        """Memory for them, and each of them in it, laid out as its parameter."""
        params = self._whole.params[: self._small]
        *places, end = accumulate([param.numel() for param in params], initial=0)
        flat = torch.empty(end, dtype=self._dtype, device="cpu")
        return flat, [flat.as_strided(p.shape, p.stride(), at) for p, at in zip(params, places, strict=True)]

    def _converted(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, or copies in the type of the arithmetic."""
        return tensors if tensors[0].dtype == self._dtype else [each.to(self._dtype) for each in tensors]


class Part(NamedTuple):
    """What one call updates: a list of each stream."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]  # none without amsgrad
    averages: list[Tensor]  # as above
    counts: list[Tensor]


def _average(averages: list[Tensor], params: list[Tensor], counts: list[Tensor], decay: float) -> None:
    # A parameter's first update copies it, as torch.optim.swa_utils.AveragedModel does.
    weights = [1.0 if count == 1.0 else 1.0 - decay for count in torch.stack(counts).tolist()]
    if len(set(weights)) == 1:
        torch._foreach_lerp_(averages, params, weights[0])
        return
    for average, param, weight in zip(averages, params, weights, strict=True):
        average.lerp_(param, weight)


def _likeness(entry: TensorEntry) -> object:
    """Equal for tensors that one call may update; None for what torch's kernel cannot take."""
    state, param, grad = entry.state, entry.original, entry.grad
    assert state is not None
    assert grad is not None
    if entry.staged or entry.stochastic_rounding or type(param) not in (Tensor, Parameter) or param.is_inference():
        return None
    if state.master_low is not None or state.beta_products is not None:
        return None
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    streams = (state.exp_avg, state.exp_avg_sq, state.max_exp_avg_sq, state.average)
    if any(each is not None and each.dtype != dtype for each in streams):
        return None
    return entry.group, param.dtype, grad.dtype, state.max_exp_avg_sq is None, state.average is None
