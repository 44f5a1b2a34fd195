"""docs/parity.md is what tests/parity_table.py writes, and its rows come from tests that run both optimizers."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import parity_table
import pytest
import torch
from parity_table import THEMES, complaints, page, rows

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
    by_test = {row.test: asdict(row) for row in rows()}
    for item in request.session.items:
        mark = item.get_closest_marker("parity")
        if mark is not None:
            row = by_test[f"{item.path.name}::{item.name.partition('[')[0]}"]
            assert mark.args == (row["theme"], row["behaviour"])
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
    mine = complaints(rows(tmp_path), tmp_path)
    assert mine == [f"no row about {theme!r}" for theme in THEMES if theme != "Copies"]
    (tmp_path / "test_x.py").write_text(ROW.replace(old, new), "utf-8")
    (others,) = set(complaints(rows(tmp_path), tmp_path)) - set(mine) - {"no row about 'Copies'"} or {
        "no row about 'Copies'"
    }
    assert words in others


@pytest.mark.parametrize("old", [', nexus="another"', '"a behaviour", ', '("Copies", "a behaviour"'])
def test_a_marker_without_its_words_is_an_error(old: str, tmp_path: Path) -> None:
    source = ROW.replace(old, "(" if old.startswith("(") else "").replace("(, ", "(")
    ast.parse(source)
    (tmp_path / "test_x.py").write_text(source, "utf-8")
    with pytest.raises(ValueError, match=r"test_x\.py::test_one: a parity marker has a theme, a behaviour"):
        rows(tmp_path)


WATCHED = """
import pytest, torch
from nexus.optim import FusedAdamW
row = pytest.mark.parity("Copies", "a behaviour", torch="one thing", nexus="same")
param = torch.nn.Parameter(torch.zeros(1))

@row
def test_both():
    torch.optim.AdamW([param], fused=True)
    FusedAdamW([param])

@row
def test_torch_alone():
    torch.optim.AdamW([param], fused=True)

@row
def test_nexus_alone():
    FusedAdamW([param])

@row
def test_torch_that_is_not_fused():
    torch.optim.AdamW([param])
    FusedAdamW([param])

def test_without_a_row():
    pass
"""


def test_a_row_whose_test_leaves_an_optimizer_out_fails(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from parity_table import pytest_runtest_call\n", "utf-8")
    (tmp_path / "test_watched.py").write_text(WATCHED, "utf-8")
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
    )
    failed = set(re.findall(r"^FAILED test_watched\.py::(\w+)", result.stdout, re.MULTILINE))
    assert failed == {"test_torch_alone", "test_nexus_alone", "test_torch_that_is_not_fused"}, result.stdout
    assert "3 failed, 2 passed" in result.stdout
    for test, missing in (("torch", "FusedAdamW"), ("nexus", "torch.optim.AdamW(fused=True)")):
        assert f"test_{test}_alone has a row in docs/parity.md and never makes {missing}" in result.stdout


def test_this_session_watches_the_tests_of_rows(request: pytest.FixtureRequest) -> None:
    plugins = request.config.pluginmanager.get_plugins()
    assert any(getattr(each, "pytest_runtest_call", None) is parity_table.pytest_runtest_call for each in plugins)


def test_watching_leaves_the_optimizers_as_they_were() -> None:
    before = torch.optim.AdamW.__init__, FusedAdamW.__init__
    with pytest.raises(AssertionError, match="never makes FusedAdamW or torch"), parity_table.both_are_made("a test"):
        assert (torch.optim.AdamW.__init__, FusedAdamW.__init__) != before
    assert (torch.optim.AdamW.__init__, FusedAdamW.__init__) == before
