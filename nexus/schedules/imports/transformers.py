"""Schedules of transformers' names."""

from __future__ import annotations

from typing import Any

import torch

from nexus.arguments import check_number
from nexus.schedules.base import Schedule
from nexus.schedules.constant import Constant
from nexus.schedules.imports.proof import metric_driven
from nexus.schedules.imports.torch_schedulers import from_torch


def from_transformers(
    name: str,
    lr: float,
    *,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    steps: int | None = None,
    exact: bool = False,
    **kwargs: Any,
) -> Schedule:
    """The schedule of a name of `transformers.get_scheduler`, with transformers' conventions.

    The rate at step 0 is 0 with a warm-up, and `lr` without. Past `num_training_steps`, transformers' cosine rises
    again, and so does this one.

    Args:
        name: `"linear"`, `"cosine"`, `"cosine_with_restarts"`, `"polynomial"`, `"constant"`, `"inverse_sqrt"`,
            `"constant_with_warmup"`, `"cosine_with_min_lr"`, `"cosine_warmup_with_min_lr"`,
            `"warmup_stable_decay"` or `"reduce_lr_on_plateau"`, a `ReduceOnPlateau`.
        lr: the optimizer's rate, 0 or above.
        num_warmup_steps: as of `get_scheduler`.
        num_training_steps: as of `get_scheduler`.
        steps: how many steps to prove, as of `from_torch`.
        exact: follow transformers' rounding by a table of `steps` rates.
        kwargs: what `get_scheduler` calls `scheduler_specific_kwargs`.

    Raises:
        NotImportable: `"greedy"`, which is metric-driven.
        ImportMismatch: some rate differs by more than 1e-11 relative plus 1e-15 of the peak.
        ValueError: an unknown name, or a number that the name needs is missing: transformers' own error.
    """
    from transformers import get_scheduler

    given = getattr(name, "value", name)
    if given == "greedy":
        raise metric_driven(f"{given!r}")
    if check_number("lr", lr) == 0.0:
        return Constant(0.0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    scheduler = get_scheduler(given, optimizer, num_warmup_steps, num_training_steps, kwargs or None)
    (schedule,) = from_torch(scheduler, steps=steps, exact=exact)
    return schedule
