"""The rates at the ends that docs/schedules/moving-over.md sets side by side."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from nexus.schedules import WSD, WSDS, Cosine, Cyclic, InverseSqrt, Linear, OneCycle, Polynomial, Schedule, Tanh

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "schedules" / "moving-over.md").read_text("utf-8")
OURS: dict[str, Schedule] = {
    "`Linear(1.0, 0.1, 10)`": Linear(1.0, 0.1, 10),
    "`Polynomial(power=2.0)`": Polynomial(1.0, 10, 2.0, 0.1),
    "`Cosine`": Cosine(1.0, 10, 0.1),
    "`WSD`, 3 stable and 4 decay steps after 3 of warm-up": WSD(3, 3, 4, 1.0, 0.1),
    "`WSDS`, a cycle of 10, 4 of them decay": WSDS(0, 10, 4, 1.0, 0.1),
    "`Tanh` to 0": Tanh(1.0, 10),
    "`OneCycle`": OneCycle(1.0, 10),
    "`InverseSqrt(1.0, 10)`": InverseSqrt(1.0, 10),
    "`Cyclic(0.1, 1.0, 5)`, torch: `CyclicLR`": Cyclic(0.1, 1.0, 5),
}
THEIRS: dict[str, Callable[[Any], Any]] = {
    "torch: `LinearLR(end_factor=0.1)` from 1": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, 10),
    "torch: `PolynomialLR(power=2.0)` to 0": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "torch: `CosineAnnealingLR`": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, 0.1),
    "`Cyclic(0.1, 1.0, 5)`, torch: `CyclicLR`": lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, 5, cycle_momentum=False),
}


def said(name: str) -> list[float]:
    """The rates of the row at t = 0, 9, 10 and 11."""
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    return [float(cell.strip(" *")) for cell in row.split("|")[2:6]]


@pytest.mark.parametrize("name", OURS)
def test_rates_of_ours(name: str) -> None:
    found = [OURS[name](step) for step in (0, 9, 10, 11)]
    assert said(name) == pytest.approx(found, rel=5e-3, abs=1e-12)  # three digits are said


@pytest.mark.parametrize("name", THEIRS)
def test_rates_of_torchs(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = THEIRS[name](optimizer)
        for _ in range(12):
            rates.append(scheduler.get_last_lr()[0])
            scheduler.step()
    assert said(name) == pytest.approx([rates[step] for step in (0, 9, 10, 11)], rel=5e-3, abs=1e-12)
