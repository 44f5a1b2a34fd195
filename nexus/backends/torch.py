"""AdamW by torch's own fused kernel: what runs on a CPU where nothing is compiled.

One call updates all tensors of a group. Everything around it, and what that kernel cannot take, is the reference's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from nexus.backends import codecs
from nexus.backends.interface import RATES, DevicePlan, TensorEntry
from nexus.backends.reference import ReferenceRunner, Work
from nexus.backends.reference_rates import evaluate

__all__ = ["DEVICE_TYPES", "NAME", "TorchRunner", "detail", "evaluate", "runner", "unavailable"]

NAME = "torch"
DEVICE_TYPES = frozenset({"cpu"})
PIECE = 1 << 20
"""Elements of which copies are made at once: few enough for a cache, and many for the threads to share."""
SMALL = 1 << 14
"""Tensors of fewer elements share a piece: they cost more by the call than by the element."""
SUMMED = 1 << 16
"""Gradients whose squares are added up in float32: their norm is right to within 2e-5, and mostly to 1e-6."""
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


class TorchWork(Work):
    """A step on the CPU.

    Args:
        plan: of all tensors there.
        sums_exactly: whether all squares are summed in float64, since sums of some are subtracted from that of all.
            They also are where some parameters are float64, whose update is to be as exact as it can be.
    """

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
        self._sums_exactly = self._sums_exactly or len(dtypes) > 1
        return others

    def gradients(self) -> list[list[Tensor]]:
        """Of each share, in stretches, and of each batch, whole."""
        return [*super().gradients(), *(batch.gradients() for batch in self._batches)]

    def sum_of_squares(self, gradients: list[list[Tensor]]) -> Tensor:
        others, own = self._divided(gradients)
        if own and not self._sums_exactly:
            sums = [batch.sum_of_squares(grads) for batch, grads in zip(self._batches, own, strict=True)]
            total = torch.stack(sums).sum()
            if TINY**2 < float(total) < math.inf:  # else a square may be out of the range of float32
                return super().sum_of_squares(others) + total
        return super().sum_of_squares([*others, *([codecs.flat(grad) for grad in grads] for grads in own)])

    def update(self, gradients: list[list[Tensor]], rates: Tensor, multiplier: Tensor, skip: Tensor | None) -> None:
        if skip is not None and bool(skip):
            return
        others, own = self._divided(gradients)
        super().update(others, rates, multiplier, None)
        of_groups = [dict(zip(RATES, each, strict=True)) for each in rates.t().tolist()]
        multipliers = multiplier.tolist()
        for batch, grads in zip(self._batches, own, strict=True):
            batch.update(grads, of_groups[batch.group], multipliers[batch.group])

    def _divided(self, gradients: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Those of the shares, and those of the batches."""
        shares = len(gradients) - len(self._batches)
        return gradients[:shares], gradients[shares:]


class Batch:
    """Tensors of a group that are updated together, as they are or, where that must be, in copies of their elements.

    Copies are made of gradients that are multiplied, by a clip coefficient or for a gradient scaler, and of gradients
    and parameters of another type than the arithmetic's. They are made piece by piece.
    """

    def __init__(self, entries: list[TensorEntry]) -> None:
        entries = sorted(entries, key=lambda entry: entry.original.numel() >= SMALL)  # small ones side by side
        self.group = entries[0].group
        self._params = [entry.original for entry in entries]
        states = [entry.state for entry in entries if entry.state is not None]
        self._amsgrad = states[0].max_exp_avg_sq is not None
        self._moments = [[state.exp_avg for state in states], [state.exp_avg_sq for state in states]]
        self._moments.append([state.max_exp_avg_sq for state in states if state.max_exp_avg_sq is not None])
        self._counts = [state.step.data for state in states]  # so that the version counts what others write
        self._ones = [torch.ones((), dtype=torch.float64, device="cpu")] * len(entries)
        self._dtype = states[0].exp_avg.dtype  # of the arithmetic
        self._copies_params = self._params[0].dtype != self._dtype
        self._copies_grads = entries[0].grad is not None and entries[0].grad.dtype != self._dtype
        self._pieces = _cut(self._params)
        self._longest = max((piece.numel for piece in self._pieces if not piece.is_shared), default=0)
        with torch.inference_mode(False):  # they may outlive a mode in which they are made
            for piece in self._pieces:
                piece.keep_copies(self._dtype, self._copies_params)

    def gradients(self) -> list[Tensor]:
        """What the tensors have now."""
        for piece in self._pieces:
            piece.has_grads = False
        return [grad for grad in (param.grad for param in self._params) if grad is not None]

    def sum_of_squares(self, grads: list[Tensor]) -> Tensor:
        """Of the gradients, in float64 from the norms of their stretches."""
        norms: list[Tensor] = []
        memory = self._memory()
        for piece in self._pieces:
            if piece.is_shared or self._copies_grads:
                flat = piece.copied_grads(grads, memory).flat
            else:
                flat = codecs.flat(piece.of(grads)[0])
            norms += torch._foreach_norm(torch.split(flat, SUMMED))
        return torch.stack(norms).double().square().sum()

    def update(self, grads: list[Tensor], rates: dict[str, float], multiplier: float) -> None:
        """Update all tensors once, with the rates of their group and a multiplier of their gradients."""
        torch._foreach_add_(self._counts, self._ones)
        rate = {name: rates[name] for name in ("lr", "beta1", "beta2", "weight_decay", "eps")}
        options: dict[str, Any] = {**rate, "amsgrad": self._amsgrad, "maximize": multiplier < 0.0}
        if abs(multiplier) == 1.0 and not (self._copies_params or self._copies_grads):
            _run(self._params, grads, self._moments, self._counts, options)
        else:
            self._update_in_pieces(grads, abs(multiplier), options)
        torch.autograd.graph.increment_version(self._params)  # which torch's kernel does not

    def _update_in_pieces(self, grads: list[Tensor], multiplier: float, options: dict[str, Any]) -> None:
        memory = self._memory()
        param_memory = self._memory() if self._copies_params else memory
        for piece in self._pieces:
            if piece.is_shared or self._copies_grads:
                copies = piece.copied_grads(grads, memory)
                if multiplier != 1.0:
                    copies.flat.mul_(multiplier)
            else:
                copies = piece.copies(memory)
                torch.mul(piece.of(grads)[0], multiplier, out=copies.views[0])
            weights = params = piece.of(self._params)
            if self._copies_params:
                weights = (piece.kept_params or piece.copies(param_memory)).views
                torch._foreach_copy_(weights, params)
            moments = [piece.of(each) for each in self._moments]
            _run(weights, copies.views, moments, self._counts[piece.tensors], options)
            if self._copies_params:
                torch._foreach_copy_(params, weights)

    def _memory(self) -> Tensor:
        """For copies of a piece that keeps none."""
        return torch.empty(self._longest, dtype=self._dtype, device="cpu")


class Copies(NamedTuple):
    """Of the elements of a piece."""

    flat: Tensor
    views: list[Tensor]  # of it, each laid out as the tensor is


class Piece:
    """Elements of which copies are made at once: several small tensors, one tensor, or a stretch of one.

    Args:
        tensors: their places in the batch.
        params: themselves.
        elements: of the one tensor; None for all.
    """

    def __init__(self, tensors: slice, params: list[Tensor], elements: slice | None = None) -> None:
        self.tensors = tensors
        self.is_shared = len(params) > 1
        self.has_grads = False  # whether the copies that it keeps are those of this step's gradients
        self.kept_params: Copies | None = None
        self._kept_grads: Copies | None = None
        self._elements = elements
        self._layouts: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []
        self.numel = 0 if elements is None else elements.stop - elements.start
        if elements is not None:
            self._layouts.append(((self.numel,), (1,), 0))
            return
        for param in params:
            self._layouts.append((param.shape, param.stride(), self.numel))
            self.numel += param.numel()

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """The piece of parameters, gradients or a moment, all tensors of which are given, or none."""
        here = tensors[self.tensors]
        return here if self._elements is None else [codecs.flat(each)[self._elements] for each in here]

    def copies(self, memory: Tensor) -> Copies:
        """Room for them at the beginning of some memory."""
        return Copies(memory[: self.numel], [memory.as_strided(*layout) for layout in self._layouts])

    def keep_copies(self, dtype: torch.dtype, of_params: bool) -> None:
        """Have memory of its own, if many tensors share it: to make views of it takes long, and it is small."""
        if self.is_shared:
            self._kept_grads = self.copies(torch.empty(self.numel, dtype=dtype, device="cpu"))
            if of_params:
                self.kept_params = self.copies(torch.empty(self.numel, dtype=dtype, device="cpu"))

    def copied_grads(self, grads: list[Tensor], memory: Tensor) -> Copies:
        """Those of the piece, in its own memory if it has some."""
        copies = self._kept_grads or self.copies(memory)
        if not (self._kept_grads and self.has_grads):
            torch._foreach_copy_(copies.views, self.of(grads))
            self.has_grads = True
        return copies


def _cut(params: list[Tensor]) -> list[Piece]:
    """Cut a batch, in which the small tensors come first."""
    pieces: list[Piece] = []
    first, filled = 0, 0
    small = sum(param.numel() < SMALL for param in params)
    for place, param in enumerate(params[:small]):
        if filled + param.numel() > PIECE:
            pieces.append(Piece(slice(first, place), params[first:place]))
            first, filled = place, 0
        filled += param.numel()
    if small:
        pieces.append(Piece(slice(first, small), params[first:small]))
    for place in range(small, len(params)):
        tensor, numel = slice(place, place + 1), params[place].numel()
        if numel <= PIECE:
            pieces.append(Piece(tensor, [params[place]]))
            continue
        for start in range(0, numel, PIECE):
            pieces.append(Piece(tensor, [params[place]], slice(start, min(start + PIECE, numel))))
    return pieces


def _run(
    params: list[Tensor],
    grads: list[Tensor],
    moments: list[list[Tensor]],
    counts: list[Tensor],
    options: dict[str, Any],
) -> None:
    exp_avgs, exp_avg_sqs, max_exp_avg_sqs = moments
    torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, counts, **options)


def _likeness(entry: TensorEntry) -> object:
    """Equal for tensors that one call may update; None for what torch's kernel cannot take."""
    state, param, grad = entry.state, entry.original, entry.grad
    assert state is not None
    assert grad is not None
    if entry.staged or entry.stochastic_rounding or type(param) not in (Tensor, Parameter) or param.is_inference():
        return None
    moments = [state.exp_avg, state.exp_avg_sq]
    moments += [] if state.max_exp_avg_sq is None else [state.max_exp_avg_sq]
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    kept = (state.master_low, state.average, state.beta_products)
    if any(each is not None for each in kept) or any(moment.dtype != dtype for moment in moments):
        return None
    return entry.group, param.dtype, grad.dtype, len(moments)
