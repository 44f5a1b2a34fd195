"""Packages with schedulers of their own, out of .venv/peers, and what is asked of the schedules beside them."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nexus.schedules import Schedule, join

PEERS = Path(sys.prefix) / "peers"
SIZES = [1, 2, 10, 113, 1000, 1001]
WARMUPS = [0, 1, 13]


def require(package: str) -> None:
    """Skip the test where a package is not installed; in CI, fail."""
    if sys.version_info < (3, 11):
        pytest.skip("the packages of tests/peers/requirements.txt need Python 3.11")
    if not (PEERS / package).is_dir():
        missing = f"{package} is not in {PEERS}: `make trainers` installs it"
        if os.environ.get("CI") in ("1", "true"):
            pytest.fail(missing)
        pytest.skip(missing)


def peer(module: str, bare: str | None = None) -> ModuleType:
    """A module of a package in .venv/peers, as it is.

    Its package `bare` is not executed, for one whose own file imports what does not run here.
    """
    require(module.partition(".")[0])
    if str(PEERS) not in sys.path:
        sys.path.append(str(PEERS))
    if bare is not None and bare not in sys.modules:
        sys.modules[bare] = module_from_spec(PathFinder.find_spec(bare))
    with warnings.catch_warnings():  # of GPUs and of further packages that are not there
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def two_groups(high: float = 0.1, other: float = 3e-3, **more: Any) -> torch.optim.Optimizer:
    """An optimizer of two groups with different rates; the second has further settings."""
    groups = [{"params": [torch.zeros(1)], "lr": high}, {"params": [torch.zeros(1)], "lr": other, **more}]
    return torch.optim.SGD(groups, lr=1.0)


def driven(optimizer: torch.optim.Optimizer, step: Callable[[], Any], updates: int) -> Iterator[list[float]]:
    """The rates of each of the updates, one a group, where `step` is called between them."""
    for update in range(updates):
        if update > 0:
            optimizer.step()
            step()
        yield [float(group["lr"]) for group in optimizer.param_groups]


def in_turn(*parts: tuple[int, Callable[[], Schedule]], last: Schedule) -> Schedule:
    """Schedules of so many steps one after the other, without those of 0 steps, and then the last."""
    taken = [(length, make()) for length, make in parts if length > 0]
    return join([*(part for _, part in taken), last], list(accumulate(length for length, _ in taken)))


def check(schedules: Sequence[Schedule], real: Iterable[Sequence[float]]) -> None:
    """Each real rate, one a group for each step, is the schedule's within 1e-11 and 1e-15 of the peak."""
    peaks = [0.0] * len(schedules)
    for step, rates in enumerate(real):
        for group, (schedule, theirs) in enumerate(zip(schedules, rates, strict=True)):
            peaks[group] = max(peaks[group], theirs)
            allowed = 1e-11 * abs(theirs) + 1e-15 * peaks[group]
            assert abs(schedule(step) - theirs) <= allowed, (step, group, theirs, schedule(step), schedule)
