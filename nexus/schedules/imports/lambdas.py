"""The functions that a LambdaLR multiplies the rate by, where they are known by name, as schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from nexus.schedules.arc import Arc
from nexus.schedules.base import Schedule
from nexus.schedules.compose import join
from nexus.schedules.constant import Constant
from nexus.schedules.linear import Linear
from nexus.schedules.powers import InverseSqrt, Polynomial


def after_rise(lr: float, warmup: int, then: Schedule, start: float = 0.0) -> Schedule:
    """A line to `lr` before a schedule on its own clock."""
    return join([Linear(start_lr=start, end_lr=lr, total_steps=warmup), then], [warmup]) if warmup > 0 else then


def linear(lr: float, num_warmup_steps: int, num_training_steps: int) -> Schedule:
    """Transformers' linear: to 0 at the last step."""
    left = num_training_steps - num_warmup_steps
    return after_rise(
        lr, num_warmup_steps, Linear(start_lr=lr, end_lr=0.0, total_steps=left) if left > 0 else Constant(0.0)
    )


def cosine(
    lr: float,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
) -> Schedule:
    """Transformers' cosine and cosine_with_min_lr: past the last step, the wave rises again."""
    left = max(1, num_training_steps - num_warmup_steps)
    return after_rise(lr, num_warmup_steps, _wave(lr, left, num_cycles, min_lr_rate))


def cosine_with_late_peak(
    lr: float,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    min_lr_rate: float = 0.0,
    warmup_lr_rate: float | None = None,
) -> Schedule:
    """Transformers' cosine_warmup_with_min_lr: a warm-up of (t + 1) / W, or from `warmup_lr_rate` to 1 at W - 1."""
    warmup = int(num_warmup_steps)
    wave = _wave(lr, max(1, num_training_steps - warmup), num_cycles, min_lr_rate, shift=1.0)
    if warmup == 0:
        return wave
    if warmup_lr_rate is None:
        rise: Schedule = Arc("rise", high=lr, low=0.0, span=float(warmup), shift=1.0)
    else:
        rise = Linear(start_lr=warmup_lr_rate * lr, end_lr=lr, total_steps=max(1, warmup - 1))
    return join([rise, wave], [warmup])


def restarts(lr: float, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 1) -> Schedule:
    """Transformers' cosine_with_restarts: whole or broken numbers of cycles, then 0."""
    left = max(1, num_training_steps - num_warmup_steps)
    span = left / num_cycles
    starts = sorted({min(left, math.ceil(cycle * left / num_cycles)) for cycle in range(math.ceil(num_cycles))})
    arcs = [
        Arc("cosine", high=lr, low=0.0, span=span, shift=_since_cycle(start, left, num_cycles)) for start in starts
    ]
    zero = num_warmup_steps + left if num_training_steps > num_warmup_steps else num_warmup_steps + 1
    return after_rise(lr, num_warmup_steps, join([*arcs, Constant(0.0)], [*starts[1:], zero - num_warmup_steps]))


def polynomial(
    lr: float, num_warmup_steps: int, num_training_steps: int, lr_end: float = 1e-7, power: float = 1.0
) -> Schedule:
    """Transformers' polynomial: to `lr_end` at the last step."""
    left = num_training_steps - num_warmup_steps
    return after_rise(
        lr,
        num_warmup_steps,
        Polynomial(peak_lr=lr, total_steps=left, power=power, min_lr=lr_end) if left > 0 else Constant(lr_end),
    )


def inverse_sqrt(lr: float, num_warmup_steps: int, timescale: float | None = None) -> Schedule:
    """Transformers' inverse_sqrt: lr / sqrt(1 + (t - W) / timescale) after the warm-up."""
    return after_rise(
        lr, num_warmup_steps, InverseSqrt(peak_lr=lr, timescale=timescale or num_warmup_steps or 10_000)
    )


def warmup_stable_decay(
    lr: float,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_stable_steps: int,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> Schedule:
    """Transformers' warmup_stable_decay: three kinds of warm-up and of decay, then the least rate."""
    least, decay_span = min_lr_ratio * lr, float(max(1, num_decay_steps))
    parts: list[tuple[int, Schedule]] = [(num_stable_steps, Constant(lr))]
    if num_warmup_steps:
        span = float(num_warmup_steps)
        rises: dict[str, Schedule] = {
            "linear": Arc("rise", high=lr, low=least, span=span),
            "cosine": Arc("cosine", high=least, low=lr, span=span),
            "1-sqrt": Arc("power", high=least, low=lr, span=span, q=0.5),
        }
        parts.insert(0, (num_warmup_steps, rises[warmup_type]))
    decays: dict[str, Schedule] = {
        "linear": Arc("linear", high=lr, low=least, span=decay_span),
        "cosine": _wave(lr, num_decay_steps or 1, num_cycles, min_lr_ratio),
        "1-sqrt": Arc("sqrt", high=lr, low=least, span=decay_span),
    }
    parts.append((num_decay_steps, decays[decay_type]))
    return _in_turn(parts, Constant(least))


def constant_with_warmup(lr: float, num_warmup_steps: int) -> Schedule:
    """Transformers' constant_with_warmup."""
    return after_rise(lr, num_warmup_steps, Constant(lr))


def torchtitan_decay(
    lr: float,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    lr_decay_type: str,
    min_lr_factor: float,
) -> Schedule:
    """Torchtitan's function: a warm-up of (t + 1) / W, the peak, a decay of (t + 1) / D; and then the least rate."""
    least = min_lr_factor * lr
    parts: list[tuple[int, Schedule]] = []
    if warmup_steps > 0:
        parts.append((warmup_steps, Arc("rise", high=lr, low=0.0, span=float(warmup_steps), shift=1.0)))
    parts.append((stable_steps, Constant(lr)))
    if decay_steps > 1:
        parts.append((decay_steps - 1, Arc(lr_decay_type, high=lr, low=least, span=float(decay_steps), shift=1.0)))
    return _in_turn(parts, Constant(least if decay_steps > 0 else lr))


TORCHTITAN_ARGUMENTS = {"warmup_steps", "stable_steps", "decay_steps", "lr_decay_type", "min_lr_factor"}


def last_step(fn: Callable[[int], float]) -> int | None:
    """The last step that a known function is made for; torchtitan's leaves the least rate after it, or raises."""
    arguments = _torchtitan_arguments(fn)
    if arguments is None:
        return None
    return int(arguments["warmup_steps"] + arguments["stable_steps"] + arguments["decay_steps"]) - 1


def schedule_of(fn: Callable[[int], float], lr: float) -> Schedule | None:
    """The schedule of `lr` times a known function of transformers or torchtitan; None for any other."""
    titan = _torchtitan_arguments(fn)
    if titan is not None:
        return torchtitan_decay(lr, **titan)
    inner = fn.func if isinstance(fn, partial) else fn
    if getattr(inner, "__module__", None) != "transformers.optimization":
        return None
    arguments: dict[str, Any] = dict(fn.keywords) if isinstance(fn, partial) else {}
    if "lr_init" in arguments:  # the optimizer's default rate, which need not be the group's
        arguments["lr_end"] *= lr / arguments.pop("lr_init")
    name = str(getattr(inner, "__name__", ""))
    if name == "_get_constant_lambda":
        return Constant(lr)
    return KNOWN[name](lr, **arguments) if name in KNOWN else None


KNOWN: dict[str, Callable[..., Schedule]] = {
    "_get_constant_schedule_with_warmup_lr_lambda": constant_with_warmup,
    "_get_linear_schedule_with_warmup_lr_lambda": linear,
    "_get_cosine_schedule_with_warmup_lr_lambda": cosine,
    "_get_cosine_with_hard_restarts_schedule_with_warmup_lr_lambda": restarts,
    "_get_polynomial_decay_schedule_with_warmup_lr_lambda": polynomial,
    "_get_inverse_sqrt_schedule_lr_lambda": inverse_sqrt,
    "_get_cosine_with_min_lr_schedule_with_warmup_lr_rate_lambda": cosine_with_late_peak,
    "_get_wsd_scheduler_lambda": warmup_stable_decay,
}


def _torchtitan_arguments(fn: Callable[[int], float]) -> dict[str, Any] | None:
    """The arguments of a partial that is torchtitan's; None for any other, and for one with other arguments."""
    if not isinstance(fn, partial) or not str(getattr(fn.func, "__module__", "")).startswith("torchtitan."):
        return None
    is_known = getattr(fn.func, "__name__", "") == "linear_warmup_stable_decay" and not fn.args
    return dict(fn.keywords) if is_known and set(fn.keywords) == TORCHTITAN_ARGUMENTS else None


def _in_turn(parts: list[tuple[int, Schedule]], last: Schedule) -> Schedule:
    """Schedules of given lengths one after the other, and then the last."""
    ends = [sum(length for length, _ in parts[: i + 1]) for i in range(len(parts))]
    return join([*(part for _, part in parts), last], ends)


def _wave(lr: float, steps: int, num_cycles: float, min_lr_rate: float, shift: float = 0.0) -> Schedule:
    if num_cycles == 0.0:
        return Constant(lr)
    return Arc("cosine", high=lr, low=min_lr_rate * lr, span=steps / (2.0 * abs(num_cycles)), shift=shift)


def _since_cycle(start: int, left: int, num_cycles: float) -> float:
    """The updates since the cycle that `start` is in began."""
    return start - math.floor(start * num_cycles / left) * left / num_cycles
