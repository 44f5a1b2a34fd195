"""The README's picture is drawn from rows of the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from benchmarks import front_page

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def test_the_picture_has_what_the_rows_say(tmp_path, monkeypatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(front_page, "save", lambda figure, path: drawn.append(figure))
    rows = RESULTS / "2026-11-23_amd-epyc.json"
    monkeypatch.setattr(sys, "argv", ["front_page", str(rows), str(tmp_path / "front.png")])
    front_page.main()
    speed, memory, rate = drawn[0].axes
    assert [text.get_text().strip() for text in speed.texts] == ["19x", "3.4x", "5.7x", "1.4x", "13x", "7x"]
    assert [text.get_text().strip() for text in memory.texts][:2] == ["16", "12"]
    assert [text.get_text().strip() for text in memory.texts][-2:] == ["7.06", "6.06"]
    rates = rate.lines[-1].get_ydata()
    assert len(rates) == front_page.STEPS
    assert (rates[100], rates[449], rates[650], rates[-1]) == pytest.approx((1e-3, 1e-3, 1e-4, 1e-3))
