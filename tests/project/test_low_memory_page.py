"""The numbers in docs/low-memory.md are those of the code."""

import json
import re
from pathlib import Path

import pytest
import torch

from nexus.optim.storage import MODES, bytes_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "low-memory.md").read_text("utf-8")


def table(section: str) -> list[list[str]]:
    """The cells of the table in a section, without its head."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*\|$", text, re.M)[2:]]


def test_modes_are_those_of_the_code() -> None:
    rows = table("Modes")
    assert [(name, *numbers) for name, _, *numbers in rows] == [
        (name, f"{resident:.2f}", f"{moved:.2f}") for name, resident, moved in bytes_table()
    ]
    for (_, options, *_), (name, _, meant) in zip(rows, MODES, strict=True):
        written = options.strip("`") if meant else ""
        assert eval(f"dict({written})", {"torch": torch}) == meant, name


def test_losses_are_those_of_the_rows() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.low_memory_training import CONTROL, summary

    def signed(value: float, digits: int) -> str:
        return f"{round(value, digits) + 0.0:+.{digits}f}"  # never -0

    path = ROOT / "benchmarks" / "results" / "2026-11-26_amd-epyc-low-memory-training.jsonl"
    found = summary([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    assert table("Accuracy") == [
        [mode, f"{mean:.4f}", signed(difference, 4), signed(deviations, 1)]
        for mode, mean, difference, deviations in found
    ]
    assert {mode for mode, _, _, deviations in found if abs(deviations) > 2.0} == {CONTROL}
