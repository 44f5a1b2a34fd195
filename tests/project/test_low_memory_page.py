"""The numbers in docs/low-memory.md are those of the code."""

import re
from pathlib import Path

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
