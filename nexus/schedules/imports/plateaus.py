"""Plateaus of torch's, on the device."""

from __future__ import annotations

from typing import Any

from nexus.schedules import reports
from nexus.schedules.constant import Constant
from nexus.schedules.imports.proof import NotImportable
from nexus.schedules.plateau import ReduceOnPlateau


def plateaus_of(scheduler: Any, *, exact: bool = False) -> list[ReduceOnPlateau]:
    """Of each group of a `ReduceLROnPlateau`, from its present rate on; `heard_by` tells what it has heard."""
    if exact:
        raise NotImportable("a ReduceLROnPlateau has no table of rates: leave out exact=True")
    groups, s = scheduler.optimizer.param_groups, scheduler
    least = s.min_lrs if len(s.min_lrs) == len(groups) else [s.default_min_lr] * len(groups)
    names = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps")
    same = {name: getattr(s, name) for name in names}
    return [
        ReduceOnPlateau(Constant(float(group["lr"])), min_lr=float(low), **same)
        for group, low in zip(groups, least, strict=True)
    ]


def heard_by(scheduler: Any, schedule: ReduceOnPlateau) -> list[float]:
    """What a `ReduceLROnPlateau` has heard, for the table of a group's schedule."""
    s = scheduler
    return reports.beginning(schedule, schedule.base, float(s.best), s.num_bad_epochs, s.cooldown_counter)
