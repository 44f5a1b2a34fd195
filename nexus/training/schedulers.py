"""Schedulers with the interface of `torch.optim.lr_scheduler`, over the schedules of `nexus.schedules`.

Over any torch optimizer they write `group["lr"]` as torch's schedulers do. Over a `FusedAdamW` the rate is
computed on the device: `step()` advances a device counter and evaluates the schedule there, without
synchronising. `get_last_lr()` is computed on the host in either case, by the oracle, from `last_epoch`.

>>> import torch
>>> from nexus.training.schedulers import WSDScheduler
>>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
>>> scheduler = WSDScheduler(optimizer, warmup_steps=2, stable_steps=5, decay_steps=4, peak_lr=1e-3)
>>> for _ in range(3):
...     optimizer.step()
...     scheduler.step()
>>> scheduler.get_last_lr(), scheduler.get_phase()
([0.001], 'stable')
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nexus.arguments import check_count, check_number, refuse_unnamed, shown
from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, engine_of
from nexus.optim.groups import OWN_SCHEDULE
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule
from nexus.schedules.clock import Clocked
from nexus.schedules.compose import checked_part
from nexus.schedules.edits import edited, resumed, saved_form
from nexus.training.device_rates import DeviceRates

__all__ = ["CosineAnnealingScheduler", "CosineRestartScheduler", "FollowingScheduler", "ScheduleLR", "WSDScheduler"]

S = TypeVar("S", bound=Schedule)
_Self = TypeVar("_Self", bound="ScheduleLR[Any]")


class ScheduleLR(LRScheduler, Generic[S]):
    """Drives an optimizer by any schedule; `scheduler.schedule` is the schedule as it now stands.

    Args:
        optimizer: any torch optimizer. A group's `"lr_scale"` (1.0) multiplies its rate.
        schedule: the rate of each update.
        last_epoch: -1 to start; the index of the last epoch to resume.

    Raises:
        TypeError, ValueError: naming the argument, what was given and what is allowed.
        RuntimeError: the optimizer is a FusedAdamW with a schedule of its own.

    >>> import torch
    >>> from nexus.schedules import Cosine
    >>> from nexus.training.schedulers import ScheduleLR
    >>> optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=1.0)
    >>> scheduler = ScheduleLR(optimizer, Cosine(peak_lr=0.5, total_steps=10))
    >>> scheduler.get_last_lr()
    [0.5]
    """

    def __new__(cls: type[_Self], *args: Any, **named: Any) -> _Self:
        refuse_unnamed(cls, args, named)
        made: _Self = super().__new__(cls)
        return made

    def __init__(self, optimizer: Optimizer, schedule: S, *, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {shown(optimizer)}")
        if isinstance(schedule, Clocked):
            raise TypeError(f"a scheduler counts its own steps, got {schedule!r}; give it to FusedAdamW as lr")
        checked_part("schedule", schedule)
        if isinstance(last_epoch, bool) or not isinstance(last_epoch, int) or last_epoch < -1:
            raise ValueError(f"last_epoch must be an int from -1, got {shown(last_epoch)}")
        self.schedule = self._given = schedule
        self._edits: dict[str, Any] = {}  # what has made the one of the other
        self._checked_scales: list[float] = []
        self._device_rates: DeviceRates | None = None
        if not isinstance(optimizer, FusedAdamW):
            super().__init__(optimizer, last_epoch)
            return
        _check_unscheduled(optimizer)
        drivers = [group.driver for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.driver = None  # a group lets one of these schedulers follow another
        self._device_rates = DeviceRates(optimizer, schedule, last_epoch)
        try:
            super().__init__(optimizer, last_epoch)
            drivers = [type(self).__name__] * len(drivers)
        finally:
            for group, driver in zip(optimizer.param_groups, drivers, strict=True):
                group.driver = driver

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at `last_epoch`, by the oracle."""
        rate = self.schedule(self.last_epoch)
        return [scale * rate for scale in self._scales()]

    def _update_lr(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else check_count("epoch", epoch)
        if self._device_rates is not None:
            self._device_rates.move_to(self.last_epoch)
        self._show()

    def _show(self) -> None:
        """Let every group have the rate at `last_epoch`."""
        self._last_lr = self.get_lr()
        if self._device_rates is not None:
            self._device_rates.show(self._scales())
            return
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate

    def before_replay(self) -> None:
        """Let a graph that has captured `step()` see the groups' `"lr_scale"`."""
        if self._device_rates is not None:
            self._device_rates.take_scales(self._scales())

    def after_replay(self, steps: int) -> None:
        """Follow a graph that has captured `steps` calls of `step()`: the device has advanced by itself."""
        self.last_epoch += steps
        self._step_count += steps
        if self._device_rates is not None:
            self._device_rates.counted += steps
        self._last_lr = self.get_lr()

    def _scales(self) -> list[float]:
        given = [group.get("lr_scale", 1.0) for group in self.optimizer.param_groups]
        if given != self._checked_scales:
            self._checked_scales = [check_number("lr_scale", scale) for scale in given]
        return self._checked_scales

    def _edit(self, edits: dict[str, Any], on_device: Callable[[DeviceRates], None]) -> None:
        """Go on with these edits of the schedule, also `on_device`; the rate of this moment is shown anew."""
        self.schedule = edited(self._given, edits)
        self._edits = edits
        if self._device_rates is not None:
            on_device(self._device_rates)
        self._show()

    def get_phase(self, step: int | None = None) -> str:
        """The phase of an update: by default that of the next `optimizer.step()`."""
        return self.schedule.phase(self.last_epoch if step is None else step)

    def state_dict(self) -> dict[str, Any]:
        """Plain types: the schedule as it was given, what has been edited of it, and where it stands."""
        return {
            "schedule": self._given.to_dict(),
            "edits": saved_form(self._given, self._edits),
            "last_epoch": self.last_epoch,
            "base_lrs": [float(rate) for rate in self.base_lrs],
            "_step_count": self._step_count,
            "_last_lr": [float(rate) for rate in self._last_lr],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where `state_dict` was saved, with this scheduler's schedule and the saved edits of it.

        A warning names each field in which the saved schedule is another one.

        Raises:
            TypeError, ValueError: the state holds no schedule of this class's type, or edits that do not fit this
                one's. Nothing is changed.
        """
        if not isinstance(state_dict, dict) or "schedule" not in state_dict or "last_epoch" not in state_dict:
            given = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else shown(state_dict)
            raise ValueError(
                f"not a {type(self).__name__}'s state dict: it needs 'schedule' and 'last_epoch', got {given}"
            )
        saved = Schedule.from_dict(state_dict["schedule"])
        if type(saved) is not type(self.schedule):
            raise ValueError(
                f"the state dict holds a {type(saved).__name__} schedule, {type(self).__name__} takes "
                f"{type(self.schedule).__name__}"
            )
        last_epoch = check_count("last_epoch", state_dict["last_epoch"])
        step_count = check_count("_step_count", state_dict.get("_step_count", last_epoch + 1))
        base_lrs = list(state_dict.get("base_lrs", self.base_lrs))
        self._scales()  # raises where one is bad
        edits, notes = resumed(self._given, saved, state_dict, last_epoch)
        for note in notes:
            warnings.warn(note, stacklevel=2)
        self.last_epoch = last_epoch
        self.base_lrs = base_lrs
        self._step_count = step_count
        self._edit(edits, lambda rates: rates.go_on(self.schedule, last_epoch))


def _own_schedule(optimizer: FusedAdamW) -> Schedule | None:
    # A schedule that was assigned to a group is its "lr" until the next step.
    rates = (rate for group in optimizer.param_groups for rate in (group["lr"], group.get("lr_schedule")))
    return next((rate for rate in rates if isinstance(rate, Schedule)), None)


def _check_unscheduled(optimizer: Optimizer) -> None:
    schedule = _own_schedule(optimizer) if isinstance(optimizer, FusedAdamW) else None
    if schedule is not None:
        raise RuntimeError(f"this FusedAdamW {OWN_SCHEDULE.format(schedule)}")


class WSDScheduler(ScheduleLR[WSD]):
    """Warmup-Stable-Decay (Hu et al. 2024, arXiv:2404.06395), of the arguments of `nexus.schedules.WSD`.

    `optimizer` and `last_epoch` are those of `ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        stable_steps: int | None,
        decay_steps: int,
        peak_lr: float,
        min_lr: float = 0.0,
        decay_type: str = "linear",
        decay_power: float = 2.0,
        warmup_start_lr: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        schedule = WSD(
            warmup_steps=warmup_steps,
            stable_steps=stable_steps,
            decay_steps=decay_steps,
            peak_lr=peak_lr,
            min_lr=min_lr,
            decay_type=decay_type,
            decay_power=decay_power,
            warmup_start_lr=warmup_start_lr,
        )
        super().__init__(optimizer, schedule, last_epoch=last_epoch)

    def begin_decay(self) -> None:
        """Let the decay begin with the next update, from the rate of this moment; one that has begun goes on.

        Raises:
            ValueError: the rate of this moment is 0.
        """
        edits, now = self._edits, self.last_epoch
        begun = self.schedule.begin_decay(now)  # raises where the rate is 0
        if self.get_phase() in ("warmup", "stable"):
            edits = {**edits, "decay_start": now, "decay_from": begun.peak_lr}
        self._edit(edits, DeviceRates.begin_decay)

    def extend_stable(self, n: int) -> None:
        """Make the stable phase `n` updates longer; once the decay has begun, this does nothing.

        Raises:
            TypeError, ValueError: `n` is no count, or the stable phase is open-ended.
        """
        n = check_count("n", n)
        self.schedule.extend_stable(n)  # raises where it is open-ended
        if n == 0 or self.get_phase() in ("decay", "done"):
            return
        edits = {**self._edits, "extended": self._edits.get("extended", 0) + n}
        if "decay_start" in edits:  # it waits again, after a step back to an earlier epoch
            edits["decay_start"] += n
        self._edit(edits, lambda rates: rates.table.extend_stable(n, rates.counter))


class CosineRestartScheduler(ScheduleLR[CosineRestarts]):
    """Cosine annealing with warm restarts (Loshchilov & Hutter 2017, arXiv:1608.03983), after a warm-up.

    The arguments are those of `nexus.schedules.CosineRestarts`; `optimizer` and `last_epoch`, of `ScheduleLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        peak_lr: float,
        min_lr: float = 0.0,
        cycle_length: int = 10_000,
        cycle_mult: float = 1.0,
        warmup_steps: int = 0,
        cycle_decay: float = 1.0,
        warmup_start_lr: float | None = None,
        last_epoch: int = -1,
    ) -> None:
        schedule = CosineRestarts(
            peak_lr=peak_lr,
            min_lr=min_lr,
            cycle_length=cycle_length,
            cycle_mult=cycle_mult,
            warmup_steps=warmup_steps,
            cycle_decay=cycle_decay,
            warmup_start_lr=warmup_start_lr,
        )
        super().__init__(optimizer, schedule, last_epoch=last_epoch)

    def get_cycle_info(self, step: int | None = None) -> dict[str, int]:
        """`cycle_idx`, `step_in_cycle` and `cycle_length` of an update, by default of the next one.

        In the warm-up, `cycle_idx` is -1 and the cycle is the warm-up itself.
        """
        cycle = self.schedule.cycle(self.last_epoch if step is None else step)
        return dict(zip(("cycle_idx", "step_in_cycle", "cycle_length"), cycle, strict=True))


class CosineAnnealingScheduler(ScheduleLR[Cosine]):
    """A linear warm-up and one half-cosine, which ends at `total_steps`; see `nexus.schedules.Cosine`.

    Args:
        optimizer, last_epoch: those of `ScheduleLR`.
        warmup_steps: updates of the warm-up.
        total_steps: updates in all, the warm-up included.
        peak_lr: the rate at the end of the warm-up; None takes the optimizer's own `lr`.
        min_lr: the rate at the end.
        warmup_start_lr: the rate at step 0 of a warm-up; None is `min_lr`.
        max_steps: an older name of `total_steps`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        total_steps: int | None = None,
        peak_lr: float | None = None,
        min_lr: float = 0.0,
        warmup_start_lr: float | None = None,
        last_epoch: int = -1,
        max_steps: int | None = None,
    ) -> None:
        if peak_lr is None and isinstance(optimizer, Optimizer):
            _check_unscheduled(optimizer)
            default = optimizer.defaults["lr"]
            peak_lr = float(optimizer.param_groups[0]["lr"] if isinstance(default, Schedule) else default)
        if (total_steps is None) == (max_steps is None):
            given = f"got {total_steps!r} and {max_steps!r}"
            raise TypeError(f"one of total_steps and max_steps, its older name, must be given, {given}")
        steps: Any = max_steps if total_steps is None else total_steps
        schedule = Cosine(
            peak_lr=peak_lr,
            total_steps=steps,
            min_lr=min_lr,
            warmup_steps=warmup_steps,
            warmup_start_lr=warmup_start_lr,
        )
        super().__init__(optimizer, schedule, last_epoch=last_epoch)


class FollowingScheduler(LRScheduler):
    """Reports the rates of a `FusedAdamW` that has a schedule of its own, to a trainer that wants a scheduler.

    It drives nothing. `get_last_lr()` reads the rates that the last update used, also after `begin_decay()`, a load
    or a skipped step; on a GPU it waits for that update.

    Args:
        optimizer: a `FusedAdamW`, itself and not a wrapper of it, that was given a `Schedule` as `lr`.

    Raises:
        TypeError: `optimizer` is no `FusedAdamW`.
        ValueError: none of its groups has a schedule.

    >>> import torch
    >>> from nexus.optim import FusedAdamW
    >>> from nexus.schedules import WSD
    >>> from nexus.training.schedulers import FollowingScheduler
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = FusedAdamW([weight], lr=WSD(warmup_steps=4, stable_steps=8, decay_steps=4, peak_lr=1.0))
    >>> scheduler = FollowingScheduler(optimizer)
    >>> for _ in range(3):
    ...     weight.grad = torch.ones(2)
    ...     optimizer.step()
    ...     scheduler.step()
    >>> scheduler.get_last_lr()
    [0.5]
    """

    optimizer: FusedAdamW

    def __init__(self, optimizer: FusedAdamW) -> None:
        # Not as other schedulers begin: that would write the optimizer's groups, and wrap its step().
        if not isinstance(optimizer, FusedAdamW):
            raise TypeError(f"optimizer must be a nexus.optim.FusedAdamW, got {shown(optimizer)}")
        if _own_schedule(optimizer) is None:
            raise ValueError(
                "no parameter group of this FusedAdamW has a schedule to follow: give it one as lr, or use a "
                "scheduler that sets the rate"
            )
        self.optimizer = optimizer
        self.last_epoch = 0
        self._step_count = 1

    def step(self, epoch: int | None = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._step_count += 1

    def get_last_lr(self) -> list[float | Tensor]:
        if any(isinstance(group["lr"], Schedule) for group in self.optimizer.param_groups):
            engine_of(self.optimizer).settle(attributes_of(self.optimizer))
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    get_lr = get_last_lr

    def state_dict(self) -> dict[str, Any]:
        """How often it was stepped. The schedule and its place are in the optimizer's state dict."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the count of any scheduler, as of the one that drove this run before."""
        self.last_epoch = check_count("last_epoch", state_dict.get("last_epoch"))
        self._step_count = self.last_epoch + 1
