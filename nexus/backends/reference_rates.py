"""A schedule's values in plain PyTorch, and what the groups of a step have as their rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nexus.backends import sharding
from nexus.backends.interface import RATES, GroupSettings, Rate, StepState
from nexus.schedules.curves import LARGEST, NEVER, Curve, Op


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps` (int64, any shape), from its table (`nexus.schedules.table`) on their device."""
    return _evaluated(table.unsqueeze(0), steps.reshape(1, -1)).view(steps.shape)


def _evaluated(tables: Tensor, steps: Tensor) -> Tensor:
    """Values by schedule, of steps by schedule; the tables, of one size: (schedules, layers, rows, 9)."""
    value = torch.zeros(steps.shape, dtype=torch.float64, device=steps.device)
    for layer in tables.unbind(1):
        own = _layer_values(layer, steps)
        op = layer[:, 0, :1]
        folds = {
            Op.FIRST: own,
            Op.TIMES: _bounded(value * own),
            Op.PLUS: _bounded(value + own),
            Op.MIN: torch.where(own < value, own, value),
            Op.MAX: torch.where(own > value, own, value),
        }
        for each, folded in folds.items():
            value = torch.where(op == each, folded, value)
    return value


def _layer_values(layer: Tensor, steps: Tensor) -> Tensor:
    count, repeat_start, repeat_length = layer[:, 0, 1:4].to(torch.int64).unsqueeze(2).unbind(1)
    repeated = repeat_start + (steps - repeat_start) % repeat_length
    steps = torch.where(steps >= repeat_start, repeated, steps).contiguous()
    rows = layer[:, 1:]
    places = torch.arange(rows.shape[1], device=layer.device)
    starts = torch.where(places < count, rows[:, :, 1].to(torch.int64), NEVER)
    found = torch.searchsorted(starts, steps, right=True) - 1  # the last segment with start <= step
    row = rows.gather(1, found.unsqueeze(-1).expand(-1, -1, rows.shape[2]))
    curve, start, period, offset, span, high, low, k, q = row.unbind(-1)
    position = (steps - start.to(torch.int64)) % period.to(torch.int64)
    p = (position.to(torch.float64) + offset) / span
    powered = _power(p, k)
    weights = {
        Curve.CONSTANT: torch.ones_like(p),
        Curve.RISE: p,
        Curve.LINEAR: 1.0 - p,
        Curve.COSINE: _power(torch.cos(0.5 * math.pi * powered).square(), q),
        Curve.SQRT: 1.0 - torch.sqrt(p),
        Curve.POWER: _power(1.0 - powered, q),
        Curve.EXPONENTIAL: (_power(q, p) - k) / (1.0 - k),
        Curve.STAIRCASE: _power(q, p.floor()),
        Curve.INVERSE: 1.0 / _power(1.0 + p, q),
        Curve.LOG: k * torch.log(p),
        Curve.TANH: 0.5 * (1.0 - torch.tanh(k * (1.0 - p) + q * p)),
        Curve.SAMPLED: _sampled(layer.flatten(1), k, q, p),
    }
    weight = torch.full_like(p, math.nan)
    for each, values in weights.items():
        weight = torch.where(curve == each, values, weight)
    return _bounded(low + weight * (high - low))


def _bounded(rates: Tensor) -> Tensor:
    """The rates; the largest number that there is for higher ones: infinity times 0 would be NaN."""
    return rates.clamp(max=LARGEST)


def _power(x: Tensor, k: Tensor) -> Tensor:
    """x**k, without the math library where IEEE operations give it."""
    result = torch.where(k == 0.5, x.sqrt(), x.pow(k))
    return torch.where(k == 1.0, x, torch.where(k == 2.0, x * x, result))


def _sampled(numbers: Tensor, first: Tensor, count: Tensor, p: Tensor) -> Tensor:
    """The values at places p of `count` samples, of which the last stays; any number where there are none."""
    last = count - 1.0
    place = torch.minimum(p.floor().clamp(min=0.0), last)
    end = numbers.shape[1] - 1
    at = [(first + torch.minimum(place + more, last)).clamp(0, end).to(torch.int64) for more in (0, 1)]
    value, following = (numbers.gather(1, each) for each in at)
    rest = p - place
    return torch.where((rest > 0.0) & (rest < 1.0), value + rest * (following - value), value)


class GroupRates:
    """What the groups of a device have set, each one of `RATES` by group; what moves, as it is in the coming step."""

    def __init__(self, groups: list[GroupSettings], state: StepState) -> None:
        self._state = state
        every: list[Rate] = [group[name] for name in RATES for group in groups]
        self._every = every
        self.take_values()
        self.signs = self._numbers([-1.0 if group["maximize"] else 1.0 for group in groups])
        self._scheduled = self._numbers([group["lr"].table is not None for group in groups]).bool()
        self._schedules: dict[torch.Size, dict[tuple[int, int], Rate]] = {}  # groups may share them
        places: dict[object, list[int]] = {}  # of what moves, among the numbers
        tensors: list[int] = []
        for place, rate in enumerate(every):
            if rate.table is not None:
                key = (id(rate.table), id(rate.clock))
                self._schedules.setdefault(rate.table.shape, {})[key] = rate
                places.setdefault(key, []).append(place)
            elif rate.tensor is not None:
                tensors.append(place)
        self._tensors = [every[place] for place in tensors]
        moving = [places[key] for alike in self._schedules.values() for key in alike] + [[place] for place in tensors]
        self._sources = self._indices([source for source, each in enumerate(moving) for _ in each])
        self._places = self._indices([place for each in moving for place in each])
        shown = [(place, rate.last) for place, rate in enumerate(every) if rate.last is not None]
        self._shown = [last for _, last in shown]
        self._shown_places = self._indices([place for place, _ in shown])

    def take_values(self) -> None:
        """Take over the numbers that are set."""
        self._fixed = self._numbers([rate.value for rate in self._every])

    def coming(self, skip: Tensor | None) -> Tensor:
        """float64 (rates, groups). Schedules leave theirs where they are shown, unless the step is skipped."""
        completed = self._state.completed
        moving = []
        for alike in self._schedules.values():
            tables = [rate.table for rate in alike.values() if rate.table is not None]
            clocks = [completed if rate.clock is None else rate.clock for rate in alike.values()]
            moving.append(self.evaluate(tables, clocks))
        for rate in self._tensors:
            tensor = rate.tensor if rate.host is None else rate.host
            assert tensor is not None
            moving.append(sharding.brought(tensor, completed.device).double().reshape(1))
        if not moving:
            return self._fixed.view(len(RATES), -1)
        numbers = self._fixed.index_copy(0, self._places, torch.cat(moving)[self._sources])
        rates = numbers.view(len(RATES), -1)
        lr = rates[RATES.index("lr")]
        lr.copy_(torch.where(self._scheduled, rates[RATES.index("lr_scale")] * lr, lr))
        if self._shown:
            self._show(numbers[self._shown_places], skip)
        return rates

    def evaluate(self, tables: list[Tensor], clocks: list[Tensor]) -> Tensor:
        """The values of schedules, from tables of one size, each at a count."""
        return _evaluated(torch.stack(tables), torch.stack(clocks).unsqueeze(1)).flatten()

    def _show(self, numbers: Tensor, skip: Tensor | None) -> None:
        shown = [last.data for last in self._shown]  # as the kernels, which count no version
        if skip is not None:
            numbers = torch.where(skip, torch.stack(shown), numbers)
        torch._foreach_copy_(shown, numbers.unbind())

    def _numbers(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self._state.device)

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._state.device)
