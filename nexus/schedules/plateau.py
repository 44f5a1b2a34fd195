"""A schedule whose rate is lowered while a metric does not improve."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

from nexus.arguments import check_choice, check_number, shown
from nexus.schedules.base import Schedule, layers_of
from nexus.schedules.compose import check_whole, checked_part
from nexus.schedules.constant import Constant
from nexus.schedules.curves import MAX_LAYERS, Layer, Op, level


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    r"""A schedule times a factor, which `FusedAdamW.report(metric)` lowers on the device while nothing improves.

    The decisions are those of `torch.optim.lr_scheduler.ReduceLROnPlateau`, and over a `Constant` the rates are its
    rates, bit for bit. A report is better than the best so far by `threshold` (relative: below
    `best * (1 - threshold)`, or above `best * (1 + threshold)`; absolute: below `best - threshold`, or above
    `best + threshold`), or it is bad, as a NaN is. After more than `patience` bad reports in a row, the factor is
    multiplied by `factor`, and in the next `cooldown` reports none counts as bad.

    Called as a value, it is `schedule`: no report has come. It is the outermost schedule: a part of no other one.

    Args:
        schedule: what the factor, 1 at first, multiplies; of at most 3 layers.
        mode: `"min"`, where smaller metrics are better, or `"max"`.
        factor: what a reduction multiplies the rate by, 0 or above and below 1.
        patience: bad reports, in a row, that are let pass.
        threshold: by how much a metric must be better, 0 or above.
        threshold_mode: `"rel"` or `"abs"`.
        cooldown: reports after a reduction in which none is bad.
        min_lr: a reduction lowers the rate of its moment (before a group's `lr_scale`) no further than to this.
        eps: a reduction that would lower the rate of its moment by no more than this is left out.
        every: so many reports are averaged, and count as one.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.

    >>> ReduceOnPlateau(Constant(0.5), patience=2)(1000)
    0.5
    """

    schedule: Schedule
    _: KW_ONLY
    mode: str = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: str = "rel"
    cooldown: int = 0  # type: ignore[assignment]  # the method would make it a part of another schedule
    min_lr: float = 0.0
    eps: float = 1e-8
    every: int = 1
    is_outermost = True

    def __post_init__(self) -> None:
        count = len(layers_of(checked_part("schedule", self.schedule)))
        if count > MAX_LAYERS - 1:
            raise ValueError(
                f"schedule must have at most {MAX_LAYERS - 1} layers, since the factor is one more, got {count}; use "
                "fewer operations"
            )
        self._set(mode=check_choice("mode", self.mode, ("min", "max")))
        self._set(threshold_mode=check_choice("threshold_mode", self.threshold_mode, ("rel", "abs")))
        for name in ("factor", "threshold", "min_lr", "eps"):
            self._set(**{name: check_number(name, getattr(self, name))})
        if self.factor >= 1.0:
            raise ValueError(f"factor must be a number from 0 to below 1, got {shown(self.factor)}")
        self._check_counts(patience=0, cooldown=0, every=1)
        check_whole(self)

    def __call__(self, step: int) -> float:
        return self.schedule(step)

    def phase(self, step: int) -> str:
        """The phase of the schedule."""
        return self.schedule.phase(step)

    @property
    def base(self) -> float:
        """What the factor is at first: a constant's rate, so that it is rounded as torch rounds a rate; or 1."""
        return self.schedule.lr if isinstance(self.schedule, Constant) and self.schedule.lr > 0.0 else 1.0

    def layers(self) -> tuple[Layer, ...]:
        """The layers of the schedule, or 1 where it is a constant, times the factor."""
        inner = layers_of(self.schedule) if self.base == 1.0 else (Layer((level(0, 1.0),)),)
        return (*inner, Layer((level(0, self.base),), Op.TIMES))

    def _scaled(self, factor: float) -> ReduceOnPlateau:
        return replace(self, schedule=factor * self.schedule, min_lr=factor * self.min_lr, eps=factor * self.eps)


def inner_of(schedule: Schedule) -> Schedule:
    """What edits are made to: of a plateau, the schedule inside of it."""
    return schedule.schedule if isinstance(schedule, ReduceOnPlateau) else schedule
