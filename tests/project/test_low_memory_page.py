"""The numbers in docs/low-memory.md are those of the code."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus.optim.storage import MODES, bytes_table

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "low-memory.md").read_text("utf-8")


PEERS = (
    "nexus in float32",
    "fused, float32",
    "DeepSpeed",
    "DeepSpeed, bfloat16",
    "torch-optimi, Kahan",
    "torchao",
    "torchao, 8 bit",
    "bitsandbytes, 8 bit",
)


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


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


def test_times_are_those_of_the_rows() -> None:
    path = ROOT / "benchmarks" / "results" / "2026-11-26_amd-epyc-low-memory-peers.json"
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in json.loads(path.read_text("utf-8"))["rows"]:
        cases.setdefault(row["title"].partition(", ")[2], {})[row["peer"]] = row
    assert {peer for rows in cases.values() for peer in rows} == set(PEERS)
    assert table("Speed") == [
        [
            mode,
            f"{rows[PEERS[0]]['nexus_us'] / 1000:.0f}",
            *(times(rows[peer]["ratio"]["median"]) if peer in rows else "" for peer in PEERS),
        ]
        for mode, rows in cases.items()
    ]


def test_losses_at_the_size_of_the_demo_are_those_of_the_rows() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.low_memory_training import BASELINE, CONTROL, summary

    path = ROOT / "benchmarks" / "results" / "2026-11-26_amd-epyc-low-memory-training-demo.jsonl"
    found = summary([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    others = [(above, deviations) for mode, _, above, deviations in found if mode not in (BASELINE, CONTROL)]
    control = next((above, deviations) for mode, _, above, deviations in found if mode == CONTROL)
    text = " ".join(PAGE.split())
    assert f"{-min(others)[0]:.3f} bits below to {max(others)[0]:.3f} bits above float32" in text
    assert f"at most {max(others)[1]:.1f} deviations" in text
    assert f"{control[0]:.3f} bits above, {control[1]:.1f} deviations" in text
    assert all(deviations < 2.0 for _, deviations in others)
