"""AdamW in plain PyTorch: the oracle of the other backends.

It runs on any device, without reading anything back to the host. Rates are in `reference_rates.py`, the update
itself in `reference_update.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from nexus.backends import sharding
from nexus.backends.interface import RATES, Change, DevicePlan, Plan, Ring, Runner, TensorEntry
from nexus.backends.reference_rates import GroupRates, evaluate
from nexus.backends.reference_update import Share, coefficients
from nexus.backends.sharding import total_everywhere
from nexus.backends.snapshot import Snapshot

__all__ = ["DEVICE_TYPES", "NAME", "ReferenceRunner", "Work", "detail", "evaluate", "runner", "unavailable"]

NAME = "reference"
SUMMED = 1 << 14
DEVICE_TYPES = frozenset({"cpu", "cuda", "mps", "xpu", "hpu", "mtia", "privateuseone"})


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """PyTorch is always there."""
    return None


def detail() -> str:
    """In words."""
    return "any device of PyTorch, in plain PyTorch"


def runner(setting_names: tuple[str, ...]) -> ReferenceRunner:
    """One for an optimizer."""
    return ReferenceRunner(setting_names)


class ReferenceRunner(Runner):
    """Runs steps over the entries of the last plan, which stays as long as a `Snapshot` sees no change."""

    def __init__(self, setting_names: tuple[str, ...]) -> None:
        self._setting_names = setting_names
        self._plan = Plan([], {})
        self._works: list[Work] = []
        self._staged: list[TensorEntry] = []
        self._spread: list[Tensor] = []
        self._snapshot: Snapshot | None = None

    def work(self, plan: DevicePlan) -> Work:
        """What steps on one device."""
        return Work(plan)

    def changed(self, attributes: dict[str, Any]) -> int:
        snapshot = self._snapshot
        if snapshot is None:
            return Change.TENSORS
        change = snapshot.change(attributes)
        if snapshot.took_rates and not change:
            snapshot.took_rates = False
            for work in self._works:
                work.rates.take_values()
        return change

    def forget(self) -> None:
        self._snapshot = None

    def release_state(self) -> None:
        self._snapshot, self._works = None, []
        for plan in self._plan.devices.values():
            for entry in plan.entries:
                entry.state = None

    def bind(self, plan: Plan, attributes: dict[str, Any]) -> None:
        self._plan = plan
        self._snapshot = None
        # Of FakeTensors, who estimate memory, copies are all of a step: the kernels allocate nothing.
        estimates = any(isinstance(param, FakeTensor) for param, _ in plan.parameters)
        self._works = [] if estimates else [self.work(each) for each in plan.devices.values()]
        entries = [entry for each in plan.devices.values() for entry in each.entries]
        self._staged = [entry for entry in entries if entry.staged]
        self._spread = [entry.original for entry in entries if sharding.is_spread(entry.original)]
        self._snapshot = Snapshot.of(plan, attributes, self._setting_names)

    def update_settings(self) -> None:
        for work in self._works:
            work.take_settings()
        if self._snapshot is not None:
            self._snapshot.take_settings(self._plan)

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        for entry in self._staged:
            entry.fetch()
        gradients = [work.gradients() for work in self._works]
        measured = [work.plan.state.sum_of_squares for work in self._works if work.plan.measures_norm]
        for work, grads in zip(self._works, gradients, strict=True):
            if work.plan.measures_norm:
                work.plan.state.sum_of_squares.copy_(work.sum_of_squares(grads))
        if self._works:
            found_inf = total_everywhere(measured, self._plan.norm_parts, found_inf)
        for work, grads in zip(self._works, gradients, strict=True):
            work.step(grads, grad_scale, found_inf)
        for entry in self._staged:
            entry.put_back()
        for param in self._spread:  # whose parts know nothing of the versions of the whole
            torch.autograd.graph.increment_version(param.detach())


class Work:
    """A step on one device, and what of it stays from step to step."""

    rates_type = GroupRates

    def __init__(self, plan: DevicePlan) -> None:
        self.plan = plan
        entries = self.take([entry for entry in plan.entries if entry.grad is not None])
        states = [entry.state for entry in entries if entry.state is not None]
        self._shares = [Share(entry, place, plan.state.seed) for place, entry in enumerate(entries)]
        self._counts = [state.step.data for state in states]  # so that the version counts what others write
        self._owners = torch.tensor([entry.group for entry in entries], dtype=torch.int64, device=plan.state.device)
        never = torch.full((3,), math.nan, dtype=torch.float64, device=plan.state.device)
        kept = [state.beta_products for state in states]
        self._kept = [place for place, products in enumerate(kept) if products is not None]
        self._products = [never if products is None else products for products in kept]
        self.take_settings()

    def take(self, entries: list[TensorEntry]) -> list[TensorEntry]:
        """Which of the entries, all with gradients, are updated tensor by tensor."""
        return entries

    def take_settings(self) -> None:
        """Take over the hyperparameters of the plan's groups."""
        self.rates = self.rates_type(self.plan.groups, self.plan.state)

    def gradients(self) -> list[list[Tensor]]:
        """Of each share, in stretches."""
        return [share.gradients() for share in self._shares]

    def sum_of_squares(self, gradients: list[list[Tensor]]) -> Tensor:
        """Of all gradients, in float64."""
        # In pieces that one thread adds up, so that the sum is the same by any number of threads.
        pieces = [piece for each in gradients for grad in each for piece in torch.split(grad, SUMMED)]
        squares = [piece.double().square().sum() for piece in pieces]
        return torch.stack(squares).sum() if squares else torch.zeros_like(self.plan.state.sum_of_squares)

    def step(self, gradients: list[list[Tensor]], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update everything once; the gradients' squares have been added up over all devices and processes."""
        plan, state = self.plan, self.plan.state
        scale = torch.ones((), dtype=torch.float64, device=state.device)
        if grad_scale is not None:
            scale = sharding.brought(grad_scale, state.device).double().reshape(())
        skip: Tensor | None = None
        if found_inf is not None:
            skip = sharding.brought(found_inf, state.device).reshape(()) != 0
        if plan.measures_norm:
            state.grad_norm.copy_(state.sum_of_squares.sqrt() / scale)
            if state.skip_nonfinite:
                nonfinite = ~torch.isfinite(state.sum_of_squares)
                skip = nonfinite if skip is None else skip | nonfinite

        rates = self.rates.coming(skip)
        limit = rates[RATES.index("max_grad_norm")]
        # The coefficient of torch.nn.utils.clip_grad_norm_.
        clip = torch.where(limit.isinf(), 1.0, torch.clamp(limit / (state.grad_norm + 1e-6), max=1.0))
        multiplier = 1.0 / scale * clip * self.rates.signs
        self.update(gradients, rates, multiplier, skip)
        if plan.history is not None:
            grad_norm = state.grad_norm if plan.measures_norm else torch.full_like(scale, math.nan)
            skipped = torch.zeros_like(scale) if skip is None else skip.to(torch.float64)
            by_group = torch.stack([rates[0], clip], dim=1).flatten()
            row = torch.stack([state.completed.to(torch.float64), skipped, grad_norm])
            _record(plan.history, torch.cat([row, by_group]))
        if plan.advances:
            state.completed.add_(1 if skip is None else ~skip)
            if skip is not None:
                state.skipped.add_(skip)

    def update(self, gradients: list[list[Tensor]], rates: Tensor, multiplier: Tensor, skip: Tensor | None) -> None:
        """Update every tensor; rates and multipliers of the gradients are by group."""
        if not self._shares:
            return
        before = torch.stack(self._counts)
        t = before + 1.0
        of_each = rates.index_select(1, self._owners)
        products = _beta_products(of_each, t, torch.stack(self._products, dim=1) if self._kept else None)
        table = coefficients(of_each, multiplier[self._owners], t, products)
        tables = {dtype: table.to(dtype) for dtype in {share.dtype for share in self._shares}}  # rounded once
        for share, grads in zip(self._shares, gradients, strict=True):
            share.update(grads, tables[share.dtype], t, skip)
        torch._foreach_copy_(self._counts, (t if skip is None else torch.where(skip, before, t)).unbind())
        if self._kept:
            after = torch.stack([*products, t], dim=1)
            after = after if skip is None else torch.where(skip, torch.stack(self._products), after)
            rows = after.unbind()
            torch._foreach_copy_([self._products[at] for at in self._kept], [rows[at] for at in self._kept])


def _record(ring: Ring, row: Tensor) -> None:
    """Leave a row."""
    ring.rows.index_copy_(0, ring.count % ring.slots, row.unsqueeze(0))
    ring.count.add_(1)


def _beta_products(rates: Tensor, t: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
    """The products of the betas of updates 1 to `t`: beta**t, unless those of the updates before are kept."""
    beta1, beta2 = rates[RATES.index("beta1")], rates[RATES.index("beta2")]
    # With a stride of 2: of what is dense, torch computes powers in vectors, which are an ulp off now and then.
    strided = torch.stack([t, t], dim=1)[:, 0]
    powers = beta1**strided, beta2**strided
    if before is None:
        return powers
    kept = before[2] == t - 1.0
    return torch.where(kept, before[0] * beta1, powers[0]), torch.where(kept, before[1] * beta2, powers[1])
