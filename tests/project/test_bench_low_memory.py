"""Training in each way of storing state, `benchmarks/low_memory_training.py`: rows, their summary, the picture."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks import low_memory_training
from benchmarks.low_memory_training import BASELINE, CONTROL, main, summary


@pytest.mark.usefixtures("restored_threads")
def test_runs_are_added_to_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(low_memory_training, "HELD_OUT_WINDOWS", 8)
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "curves.png"
    small = [str(rows), "--steps", "20", "--context", "4", "--seeds", "2"]
    assert main([*small, "--mode", BASELINE]) == 0
    first = rows.read_text("utf-8")
    assert main([*small, "--mode", BASELINE, "--mode", CONTROL, "--picture", str(picture)]) == 0
    assert rows.read_text("utf-8").startswith(first)
    found = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    assert [(row["mode"], row["seed"]) for row in found] == [(m, s) for m in (BASELINE, CONTROL) for s in (0, 1)]
    assert [row["bytes_per_parameter"] for row in found] == [16.0, 16.0, 12.0, 12.0]
    assert all(2.0 < row["held_out_bits"] < 8.0 and len(row["losses"]) == 1 for row in found)
    assert capsys.readouterr().out.count("seed 0") == 2
    assert picture.stat().st_size > 10_000


def test_a_loss_is_compared_with_the_seeds_of_float32() -> None:
    losses = {BASELINE: (1.0, 2.0, 3.0), CONTROL: (4.0, 5.0, 6.0)}
    rows = [
        {"mode": mode, "seed": seed, "held_out_bits": bits}
        for mode, found in losses.items()
        for seed, bits in enumerate(found)
    ]
    assert summary(rows) == [(BASELINE, 2.0, 0.0, 0.0), (CONTROL, 5.0, 3.0, 3.0)]
