"""The rates at the ends that docs/schedules/moving-over.md sets side by side, row by row."""

import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as theirs

from nexus.schedules import (
    WSD,
    WSDS,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseSqrt,
    Linear,
    MultiStep,
    OneCycle,
    Piecewise,
    Polynomial,
    Sampled,
    Schedule,
    StepDecay,
    Tanh,
)

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "schedules" / "moving-over.md").read_text("utf-8")
STEPS = 60
Source = Schedule | Callable[[Any], Any]  # of an optimizer, its scheduler


def named(name: str, warmup: int = 0, **kwargs: object) -> Source:
    """A name of transformers, for 10 steps."""

    def make(optimizer: Any) -> Any:
        transformers = pytest.importorskip("transformers", reason="the real objects are transformers' own")
        return transformers.get_scheduler(name, optimizer, warmup, 10, kwargs or None)

    return make


ENDS: dict[str, tuple[Source, ...]] = {
    "`Linear(start_lr=1.0, end_lr=0.1, total_steps=10)`": (Linear(start_lr=1.0, end_lr=0.1, total_steps=10),),
    "torch: `LinearLR(end_factor=0.1)` from 1": (
        partial(theirs.LinearLR, start_factor=1.0, end_factor=0.1, total_iters=10),
    ),
    'transformers: `"linear"` to 0': (named("linear"),),
    "`Polynomial(power=2.0)`": (Polynomial(peak_lr=1.0, total_steps=10, power=2.0, min_lr=0.1),),
    "torch: `PolynomialLR(power=2.0)` to 0": (partial(theirs.PolynomialLR, total_iters=10, power=2.0),),
    'transformers: `"polynomial"`, `power=2.0`': (named("polynomial", power=2.0, lr_end=0.1),),
    "`Cosine`": (Cosine(peak_lr=1.0, total_steps=10, min_lr=0.1),),
    "torch: `CosineAnnealingLR`": (partial(theirs.CosineAnnealingLR, T_max=10, eta_min=0.1),),
    'transformers: `"cosine_with_min_lr"`': (named("cosine_with_min_lr", min_lr=0.1),),
    'transformers: `"cosine_warmup_with_min_lr"` without warm-up': (named("cosine_warmup_with_min_lr", min_lr=0.1),),
    "`CosineRestarts`, torch: `CosineAnnealingWarmRestarts`": (
        CosineRestarts(peak_lr=1.0, min_lr=0.1, cycle_length=10),
        partial(theirs.CosineAnnealingWarmRestarts, T_0=10, eta_min=0.1),
    ),
    'transformers: `"cosine_with_restarts"`, `num_cycles=2`, to 0': (named("cosine_with_restarts", num_cycles=2),),
    "`WSD`, 3 stable and 4 decay steps after 3 of warm-up": (
        WSD(warmup_steps=3, stable_steps=3, decay_steps=4, peak_lr=1.0, min_lr=0.1),
    ),
    "`WSDS`, a cycle of 10, 4 of them decay": (
        WSDS(warmup_steps=0, cycle_length=10, decay_steps=4, peak_lr=1.0, min_lr=0.1),
    ),
    "`Tanh` to 0": (Tanh(peak_lr=1.0, total_steps=10),),
    "`OneCycle`": (OneCycle(peak_lr=1.0, total_steps=10),),
    "torch: `OneCycleLR`": (partial(theirs.OneCycleLR, max_lr=1.0, total_steps=10, cycle_momentum=False),),
    "`StepDecay`, torch: `StepLR`, 0.5 every 5": (
        StepDecay(peak_lr=1.0, gamma=0.5, every=5),
        partial(theirs.StepLR, step_size=5, gamma=0.5),
    ),
    "`MultiStep`, torch: `MultiStepLR`, 0.5 at 5 and 10": (
        MultiStep(peak_lr=1.0, milestones=(5, 10), gamma=0.5),
        partial(theirs.MultiStepLR, milestones=[5, 10], gamma=0.5),
    ),
    "`Exponential`, torch: `ExponentialLR`, 0.5": (
        Exponential(peak_lr=1.0, gamma=0.5),
        partial(theirs.ExponentialLR, gamma=0.5),
    ),
    "`InverseSqrt(peak_lr=1.0, timescale=10)`": (InverseSqrt(peak_lr=1.0, timescale=10),),
    "`Cyclic(base_lr=0.1, peak_lr=1.0, up_steps=5)`, torch: `CyclicLR`": (
        Cyclic(base_lr=0.1, peak_lr=1.0, up_steps=5),
        partial(theirs.CyclicLR, base_lr=0.1, max_lr=1.0, step_size_up=5, cycle_momentum=False),
    ),
    "`Piecewise`, `Sampled` from 1 to 0.1, a line": (
        Piecewise(((0, 1.0), (10, 0.1)), kind="linear"),
        Sampled((1.0, 0.1), every=10),
    ),
}
WARMUPS: dict[str, tuple[Source, ...]] = {
    "`Cosine(peak_lr=1.0, total_steps=10, min_lr=0.1, warmup_steps=3)`: from the minimum": (
        Cosine(peak_lr=1.0, total_steps=10, min_lr=0.1, warmup_steps=3),
    ),
    "the same with `warmup_start_lr=0.0`": (
        Cosine(peak_lr=1.0, total_steps=10, min_lr=0.1, warmup_steps=3, warmup_start_lr=0.0),
    ),
    "`Cosine(peak_lr=1.0, total_steps=7, min_lr=0.1).warmup(3)`: from `start`, here 0": (
        Cosine(peak_lr=1.0, total_steps=7, min_lr=0.1).warmup(3),
    ),
    'transformers: `"cosine_with_min_lr"`': (named("cosine_with_min_lr", 3, min_lr=0.1),),
    'transformers: `"cosine_warmup_with_min_lr"`': (named("cosine_warmup_with_min_lr", 3, min_lr=0.1),),
}
TABLES = {"Conventions at the ends": ENDS, "A warm-up of 3 steps before a cosine of 7:": WARMUPS}
"""The tables by the words above them."""
EARLY = [
    Cosine(peak_lr=1.0, total_steps=10, min_lr=0.1)(min(t, 20 - t)) for t in range(1, 12)
]  # a step early, and rising after the end
LATER: dict[str, Callable[[list[float]], bool]] = {
    "stays": lambda rates: max(rates[10:]) - min(rates[10:]) < 1e-15,
    "**rises** to 1 at 20, falls again": lambda rates: (
        rates[10:31] == sorted(rates[10:21]) + sorted(rates[21:31], reverse=True) and abs(rates[20] - 1.0) < 1e-12
    ),
    "**rises**; a step early throughout": lambda rates: rates[:11] == pytest.approx(EARLY),
    "restarts every 10": lambda rates: rates[10:] == pytest.approx(rates[:-10]) and rates[10] == max(rates),
    "decays again from 16 on": lambda rates: {*rates[10:17]} == {1.0} and rates[16] > rates[17] > rates[19] > 0.1,
    "stays; the end is step 9": lambda rates: rates[8] > rates[9] and len({*rates[9:]}) == 1,
    "`scheduler.step()` raises": lambda rates: len(rates) == 11,
    "0.125 at 15": lambda rates: {*rates[10:15]} == {0.25} and {*rates[15:20]} == {0.125},
    "no end": lambda rates: rates == sorted({*rates}, reverse=True),
    "again every 10": lambda rates: rates[10:] == pytest.approx(rates[:-10]),
}
"""What the last column says, of the rates from step 0 on."""


def rows(words: str) -> list[list[str]]:
    """The cells of each row of the table below these words, the header first."""
    table = re.search(r"^\|.*?(?=\n\n)", PAGE.split(words)[1], re.MULTILINE | re.DOTALL)
    assert table is not None
    header, _, *found = [[cell.strip() for cell in line[1:-1].split("|")] for line in table[0].splitlines()]
    return [header, *found]


def rates_of(source: Source) -> list[float]:
    """The rates from step 0 on; fewer where the scheduler raises."""
    if isinstance(source, Schedule):
        return source.values(0, STEPS)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    rates = []
    with warnings.catch_warnings(), suppress(ValueError):
        warnings.simplefilter("ignore")
        scheduler = source(optimizer)
        for _ in range(STEPS):
            rates.append(float(scheduler.get_last_lr()[0]))
            scheduler.step()
    return rates


def matches(cell: str, rates: list[float], step: int) -> bool:
    """Whether a cell says the rate of a step, with its digits, and at least three; or that there is none."""
    if cell == "raises":
        return step == len(rates)
    digits = max(3, len(Decimal(cell).as_tuple().digits))
    return step < len(rates) and float(cell) == float(f"{round(rates[step], 12):.{digits}g}")


@pytest.mark.parametrize("words", TABLES)
def test_every_row_is_tested(words: str) -> None:
    assert [cells[0] for cells in rows(words)[1:]] == list(TABLES[words])


@pytest.mark.parametrize(("words", "name"), [(words, name) for words, table in TABLES.items() for name in table])
def test_row(words: str, name: str) -> None:
    header, *found = rows(words)
    cells = next(each for each in found if each[0] == name)
    for source in TABLES[words][name]:
        rates = rates_of(source)
        for title, cell in zip(header[1:], cells[1:], strict=True):
            if title == "later":
                assert LATER[cell](rates), rates
            else:
                step = int(title.removeprefix("$t = ").removesuffix("$"))
                assert matches(cell.strip("*"), rates, step), (title, cell, rates[: step + 1])
