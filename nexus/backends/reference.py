"""The update in plain PyTorch, to be read beside the papers; the second oracle, and the backend of last resort.

Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; AMSGrad: Reddi et al. 2018, arXiv:1904.09237. It runs
on any device, a tensor at a time, without reading anything back to the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from nexus.backends import codecs, sharding
from nexus.backends.interface import DevicePlan, GroupSettings, Plan, Rate, Ring, Runner, TensorEntry
from nexus.backends.sharding import total_everywhere
from nexus.schedules.curves import LARGEST, NEVER, Curve, Op

NAME = "reference"
DEVICE_TYPES = frozenset({"cpu", "cuda", "mps", "xpu", "hpu", "mtia", "privateuseone"})


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """PyTorch is always there."""
    return None


def detail() -> str:
    """In words."""
    return "any device of PyTorch, one tensor at a time; slow, for comparison"


def runner(setting_names: tuple[str, ...]) -> ReferenceRunner:
    """One for an optimizer."""
    return ReferenceRunner()


def evaluate(table: Tensor, steps: Tensor) -> Tensor:
    """A schedule's values at `steps` (int64, any shape), from its table (`nexus.schedules.table`) on their device."""
    value = torch.zeros(steps.shape, dtype=torch.float64, device=steps.device)
    for layer in table:
        own = _layer_value(layer, steps)
        op = layer[0, 0]
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


def _layer_value(layer: Tensor, steps: Tensor) -> Tensor:
    count, repeat_start, repeat_length = layer[0, 1:4].to(torch.int64).unbind()
    repeated = repeat_start + (steps - repeat_start) % repeat_length
    steps = torch.where(steps >= repeat_start, repeated, steps).contiguous()
    rows = layer[1:]
    places = torch.arange(len(rows), device=layer.device)
    starts = torch.where(places < count, rows[:, 1].to(torch.int64), NEVER)
    found = torch.searchsorted(starts, steps, right=True) - 1  # the last segment with start <= step
    # Not rows[found], which reads a 0-dim row on the host.
    row = rows.index_select(0, found.flatten()).view(*found.shape, rows.shape[1])
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
        Curve.SAMPLED: _sampled(layer.flatten(), k, q, p),
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
    at = [(first + torch.minimum(place + more, last)).clamp(0, len(numbers) - 1).to(torch.int64) for more in (0, 1)]
    value, following = (numbers.index_select(0, each.flatten()).view(p.shape) for each in at)
    rest = p - place
    return torch.where((rest > 0.0) & (rest < 1.0), value + rest * (following - value), value)


class ReferenceRunner(Runner):
    """Runs steps over the entries of the last plan. It caches nothing, so it has nothing to watch."""

    def __init__(self) -> None:
        self._plan = Plan([], {})

    def release_state(self) -> None:
        for plan in self._plan.devices.values():
            for entry in plan.entries:
                entry.state = None

    def bind(self, plan: Plan, attributes: dict[str, Any]) -> None:
        self._plan = plan

    @torch.no_grad()
    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        entries = [entry for plan in self._plan.devices.values() for entry in plan.entries]
        for entry in entries:
            entry.fetch()
        # Of FakeTensors, who estimate memory, these copies are all: the kernels allocate nothing.
        if not any(isinstance(param, FakeTensor) for param, _ in self._plan.parameters):
            _step(self._plan, grad_scale, found_inf)
        for entry in entries:
            entry.put_back()
            if sharding.is_spread(entry.original):  # its part knows nothing of the versions of the whole
                torch.autograd.graph.increment_version(entry.original.detach())


def _step(plan: Plan, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    plans = list(plan.devices.values())
    measured = [each.state.sum_of_squares for each in plans if each.measures_norm]
    for each in plans:
        if each.measures_norm:
            each.state.sum_of_squares.copy_(_sum_of_squares(each.entries, each.state.device))
    found_inf = total_everywhere(measured, plan.norm_parts, found_inf)
    for each in plans:
        _step_device(each, grad_scale, found_inf)


def _sum_of_squares(entries: list[TensorEntry], device: torch.device) -> Tensor:
    squares = [entry.grad.double().square().sum() for entry in entries if entry.grad is not None]
    return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)


def _step_device(plan: DevicePlan, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    state = plan.state
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

    rows, recorded = [], []
    for group in plan.groups:
        lr, weight_decay = (_rate(group[name], state.completed) for name in ("lr", "weight_decay"))
        for rate, value in ((group["lr"], lr), (group["weight_decay"], weight_decay)):
            if rate.last is not None:
                _assign(rate.last.data, value, skip)  # as the kernels, which count no version
        clip = torch.ones_like(scale)
        if group["max_grad_norm"] != math.inf:  # the coefficient of torch.nn.utils.clip_grad_norm_
            clip = torch.clamp(group["max_grad_norm"] / (state.grad_norm + 1e-6), max=1.0)
        recorded += [lr, clip]
        multiplier = 1.0 / scale * clip
        average_weight = 1.0 - _rate(group["average_decay"], state.completed)
        rows.append((group, lr, weight_decay, -multiplier if group["maximize"] else multiplier, average_weight))
    for entry in plan.entries:
        grad = entry.grad
        if grad is not None:
            _update(entry, grad, *rows[entry.group], skip, state.seed)
    if plan.history is not None:
        grad_norm = state.grad_norm if plan.measures_norm else torch.full_like(scale, math.nan)
        skipped = torch.zeros_like(scale) if skip is None else skip.to(torch.float64)
        _record(plan.history, [state.completed.to(torch.float64), skipped, grad_norm, *recorded])
    if plan.advances:
        state.completed.add_(1 if skip is None else ~skip)
        if skip is not None:
            state.skipped.add_(skip)


def _record(ring: Ring, row: list[Tensor]) -> None:
    """Leave a row: 0-dim float64 each."""
    ring.rows.index_copy_(0, ring.count % ring.slots, torch.stack(row).unsqueeze(0))
    ring.count.add_(1)


def _rate(rate: Rate, completed: Tensor) -> Tensor:
    """The rate of the update that comes after `completed` ones: 0-dim float64."""
    if rate.table is not None:
        return rate.scale * evaluate(rate.table, completed if rate.clock is None else rate.clock)
    if rate.tensor is not None:
        tensor = rate.tensor if rate.host is None else rate.host
        return sharding.brought(tensor, completed.device).double().reshape(())
    return torch.full((), rate.value, dtype=torch.float64, device=completed.device)


def _assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    target.copy_(value if skip is None else torch.where(skip, target, value))


def _update(
    entry: TensorEntry,
    grad: Tensor,
    group: GroupSettings,
    lr: Tensor,
    weight_decay: Tensor,
    multiplier: Tensor,
    average_weight: Tensor,
    skip: Tensor | None,
    seed: int,
) -> None:
    state = entry.state
    assert state is not None
    param = entry.param
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32  # of the arithmetic
    beta1, beta2 = group["beta1"], group["beta2"]
    t = state.step + 1
    bias1 = 1.0 - beta1**t
    bias2 = 1.0 - beta2**t
    # Scalars are computed in float64 and rounded once.
    step_size, inv_sqrt_bias2, decay, g_scale = (
        scalar.to(dtype) for scalar in (lr / bias1, 1.0 / bias2.sqrt(), lr * weight_decay, multiplier)
    )
    chance = codecs.Chance(seed, entry.ordinal, t, entry.first)
    streams = _Streams(entry, skip, chance)
    g = codecs.flat(grad).to(dtype) * g_scale
    m = streams.moment("exp_avg")
    m = m + (1.0 - beta1) * (g - m)
    v = beta2 * streams.moment("exp_avg_sq") + (1.0 - beta2) * g * g
    largest_v = v
    if state.max_exp_avg_sq is not None:
        largest_v = torch.maximum(streams.moment("max_exp_avg_sq"), v)
        streams.put_moment("max_exp_avg_sq", largest_v)
    # In float64, since torch's float32 root may be off by one in its last place.
    denominator = largest_v.double().sqrt().to(dtype) * inv_sqrt_bias2 + group["eps"]
    weight = streams.weight(dtype)
    # Not (1 - decay) * weight: rounded to float32, that factor is off the same way in every step.
    decayed = torch.where(weight.isfinite(), decay * weight, 0.0)  # an infinite parameter stays what it is
    weight = weight - (decayed + step_size * m / denominator)
    streams.put_weight(weight)
    if state.average is not None:
        # A parameter's first update copies it, as torch.optim.swa_utils.AveragedModel does.
        share = torch.where(t == 1.0, 1.0, average_weight).to(dtype)
        average = streams.moment("average")
        streams.put_moment("average", torch.where(share == 1.0, weight, average + share * (weight - average)))
    streams.put_moment("exp_avg", m)
    streams.put_moment("exp_avg_sq", v)
    state.step.add_(1 if skip is None else ~skip)


class _Streams:
    """The streams of one parameter, decoded and encoded (codecs.py), each flat in the order of its memory."""

    def __init__(self, entry: TensorEntry, skip: Tensor | None, chance: codecs.Chance) -> None:
        assert entry.state is not None
        self._state = entry.state._asdict()
        self._param = codecs.flat(entry.param)
        self._skip = skip
        self._chance = chance
        self._stochastic = entry.stochastic_rounding

    def moment(self, name: str) -> Tensor:
        return codecs.decoded(codecs.flat(self._state[name]), self._state.get(f"{name}_scale"))

    def put_moment(self, name: str, value: Tensor) -> None:
        stored = codecs.flat(self._state[name])
        # To nearest, an average of squares would follow no small change (in bfloat16 with a beta2 above 0.996), and
        # a first moment in 8 bits would not come to rest, and move the weight for ever, where gradients are 0.
        frozen = stored.dtype in codecs.SCALED or (stored.dtype == torch.bfloat16 and name != "exp_avg")
        by_chance = frozen or (self._stochastic and stored.dtype == torch.bfloat16)
        codes, scale = codecs.encoded(value, stored.dtype, self._numbers if by_chance else None)
        _assign(stored, codes, self._skip)
        if scale is not None:
            _assign(self._state[f"{name}_scale"], scale, self._skip)

    def weight(self, dtype: torch.dtype) -> Tensor:
        low = self._state["master_low"]
        return self._param.to(dtype) if low is None else codecs.master(self._param, codecs.flat(low))

    def put_weight(self, value: Tensor) -> None:
        low = self._state["master_low"]
        if low is not None:
            by_chance = self._stochastic and low.dtype == torch.uint8
            upper, lower = codecs.split(value, low.dtype, codecs.swapped(self._numbers) if by_chance else None)
            _assign(codecs.flat(low), lower, self._skip)
        else:
            by_chance = self._stochastic and self._param.dtype == torch.bfloat16
            chance = codecs.swapped(self._numbers) if by_chance else None
            upper, _ = codecs.encoded(value, self._param.dtype, chance)
        _assign(self._param, upper, self._skip)

    @cached_property
    def _numbers(self) -> Tensor:
        return self._chance.of(len(self._param))
