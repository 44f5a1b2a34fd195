"""docs/parity.md is what tests/parity_table.py writes, and its rows come from tests that run both optimizers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import parity_table
import pytest
import torch
from parity_table import THEMES, complaints, page, rows
from side_by_side import fused_torch, param

from nexus.optim import FusedAdamW

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_tests_say() -> None:
    found = rows()
    assert complaints(found) == []
    assert len(found) >= 60
    assert parity_table.PAGE.read_text("utf-8") == page(found), (
        "run `python tests/parity_table.py`, and read what changed"
    )


def test_every_row_is_a_line_of_its_theme() -> None:
    found = rows()
    sections = re.split(r"^## ", page(found), flags=re.MULTILINE)[1:]
    assert [section.splitlines()[0] for section in sections] == list(THEMES)
    for section in sections:
        theme = section.splitlines()[0]
        lines = [line for line in section.splitlines() if line.startswith("| ") and "shown by" not in line]
        listed = parity_table.of_theme(found, theme)
        assert len(lines) == len(listed)
        for line, row in zip(lines, listed, strict=True):
            assert len(re.split(r"(?<!\\)\|", line)) == 6  # four cells
            assert row.test in line


def test_the_rows_are_about_the_torch_that_is_pinned() -> None:
    pinned = re.search(r"^torch==(\d+\.\d+)\.", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert pinned is not None
    assert pinned[1] == parity_table.TORCH  # a newer one: set TORCH, and see which rows are no longer true


def test_the_sources_and_the_markers_say_the_same(request: pytest.FixtureRequest) -> None:
    by_behaviour = {row.behaviour: asdict(row) for row in rows()}
    for item in request.session.items:
        for mark in item.iter_markers("parity"):
            row = by_behaviour[mark.args[-1]]
            assert row["test"] == f"{item.path.name}::{item.name.partition('[')[0]}"
            assert row["theme"] == (mark.args[0] if len(mark.args) == 2 else item.module.THEME)
            assert mark.kwargs == {name: row[name] for name in mark.kwargs}


ROW = """
@pytest.mark.parity("Copies", "a behaviour", torch="one thing", nexus="another", why="of a reason")
def test_one() -> None: ...
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"Copies"', '"Copying"', "test_x.py::test_one: 'Copying' is no theme"),
        ('"one thing"', '""', "test_x.py::test_one: an empty cell"),
        ('"another"', '"same"', "test_x.py::test_one: a row that differs says why"),
        (', why="of a reason"', "", "test_x.py::test_one: a row that differs says why"),
        ("why=", 'also=("test_x.py::test_two",), why=', "test_x.py::test_one: there is no test_x.py::test_two"),
        ("why=", 'also=("test_y.py::test_one",), why=', "test_x.py::test_one: there is no test_y.py::test_one"),
        (ROW, ROW + ROW.replace("test_one", "test_two"), "test_two: there is another row about 'a behaviour'"),
        (ROW, "", "no row about 'Copies'"),
    ],
)
def test_a_row_that_cannot_be_is_named(old: str, new: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(ROW, "utf-8")
    found = rows(tmp_path)
    mine = complaints(found, tmp_path)
    assert mine == [f"no row about {theme!r}" for theme in THEMES if theme != "Copies"]
    (tmp_path / "test_x.py").write_text('THEME = "Copies"\n' + ROW.replace('"Copies", ', ""), "utf-8")
    assert rows(tmp_path) == found
    (tmp_path / "test_x.py").write_text(ROW.replace(old, new), "utf-8")
    (others,) = set(complaints(rows(tmp_path), tmp_path)) - set(mine) - {"no row about 'Copies'"} or {
        "no row about 'Copies'"
    }
    assert words in others


@pytest.mark.parametrize("old", [', torch="one thing"', '"a behaviour", ', '"Copies", "a behaviour", '])
def test_a_marker_without_its_words_is_an_error(old: str, tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text(ROW.replace(old, ""), "utf-8")
    with pytest.raises(ValueError, match=r"test_x\.py::test_one: a parity marker has a theme, a behaviour"):
        rows(tmp_path)


TORCH, NEXUS = "torch.optim.AdamW(fused=True)", "FusedAdamW"
# what a test makes -> what is missing
MADE: dict[str, tuple[list[Callable[[Any], object]], str | None]] = {
    "both": ([fused_torch, FusedAdamW], None),
    "torch alone": ([fused_torch], NEXUS),
    "nexus alone": ([FusedAdamW], TORCH),
    "torch that is not fused": ([torch.optim.AdamW, FusedAdamW], TORCH),
    "none": ([], f"{NEXUS} or {TORCH}"),
}


@pytest.mark.parametrize(("makers", "missing"), MADE.values(), ids=MADE)
def test_a_row_whose_test_leaves_an_optimizer_out_fails(
    makers: list[Callable[[Any], object]], missing: str | None
) -> None:
    before = torch.optim.AdamW.__init__, FusedAdamW.__init__
    for has_a_row in (True, False):
        item: Any = SimpleNamespace(name="test_x", get_closest_marker={"parity": has_a_row or None}.get)
        hook: Any = parity_table.pytest_runtest_call(item)
        next(hook)
        for make in makers:
            make([param(1)])
        words = re.escape(f"test_x has a row in docs/parity.md and never makes {missing}") + "$"
        fails = has_a_row and missing is not None
        with pytest.raises(AssertionError if fails else StopIteration, match=words if fails else None):
            hook.send(None)
        assert (torch.optim.AdamW.__init__, FusedAdamW.__init__) == before


def test_this_session_watches_the_tests_of_rows(request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager.get_plugins()
    assert any(getattr(each, "pytest_runtest_call", None) is parity_table.pytest_runtest_call for each in plugins)
