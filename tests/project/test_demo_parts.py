"""What the demo is made of: its schedules, text, model, progress and figures."""

from __future__ import annotations

import math
import sys
from statistics import mean

import pytest
import torch

pytest.importorskip("matplotlib")
from pathlib import Path

from gpt import DemoError, corpus, picture, progress
from gpt.model import GPT, GPTConfig
from gpt.report import StepCost
from gpt.run import RunConfig, Size, schedule_for
from gpt.train import Training

from benchmarks.training import LearnedPositionsGPT
from nexus.schedules import WSD, Cosine, CosineRestarts

pytestmark = pytest.mark.xdist_group("demo")  # one corpus for all

MODEL = GPTConfig(layers=1, heads=2, width=16, context=32)


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.load(torch.device("cpu"))


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_in_a_terminal_and_lines_in_a_log(terminal: bool, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress.progress(schedule_for("wsd", 100), 0, 100, 10) as show:
        for step in range(5, 101, 5):
            show(step, math.log(2), 1e-3)
    err = capsys.readouterr().err
    assert "loss 1.00, rate 1.0e-03 (decay), " in err
    assert ("100/100 |" in err) == terminal
    assert err.count("step ") == (0 if terminal else 10)


def test_progress_shows_a_smoothed_loss(text: corpus.Corpus) -> None:
    training = Training(RunConfig(70, schedule_for("wsd", 70), 0, Size(MODEL, 4), "cpu", 1, ""), text)
    shown = []
    training.train(lambda: False, lambda step, loss, rate: shown.append((step, loss)))
    losses = training.losses.tolist()
    assert shown == [(step, pytest.approx(mean(losses[max(0, step - 50) : step]))) for step in range(10, 71, 10)]


def test_schedules_end_with_the_run() -> None:
    for steps in (1, 2, 3, 5, 7, 8, 19, 20, 100, 1000, 12345):
        wsd, sgdr, cosine = (schedule_for(name, steps) for name in ("wsd", "sgdr", "cosine"))
        assert [type(schedule) for schedule in (wsd, sgdr, cosine)] == [WSD, CosineRestarts, Cosine]
        assert wsd.warmup_steps + wsd.stable_steps + wsd.decay_steps == cosine.total_steps == steps
        if steps >= 7:
            assert sgdr.cycle(steps) == (3, 0, 8 * sgdr.cycle_length)


def test_the_corpus_is_real_text_split_by_file(text: corpus.Corpus) -> None:
    assert len(text.train) > 3e6
    assert 0.01 < len(text.held_out) / len(text.train) < 0.2
    assert b"def " in bytes(text.held_out.tolist())
    assert text.files > 200


def test_no_library_to_read(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="0 bytes of Python source"):
        corpus.load(torch.device("cpu"), tmp_path)


def test_batches_depend_on_seed_and_step_alone(text: corpus.Corpus) -> None:
    inputs, targets = text.batch(3, 7, size=5, context=16)
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, text.batch(3, 7, size=5, context=16)[0])
    assert not torch.equal(inputs, text.batch(3, 8, size=5, context=16)[0])
    assert not torch.equal(inputs, text.batch(4, 7, size=5, context=16)[0])


def test_the_model_sees_only_the_past() -> None:
    tokens = torch.randint(256, (1, 32))
    changed = tokens.clone()
    changed[0, 20] ^= 1
    for model in (GPT(MODEL), LearnedPositionsGPT(MODEL, 256)):
        a, b = model(tokens), model(changed)
        assert a.shape == (1, 32, 256)
        assert torch.equal(a[0, :20], b[0, :20])
        assert not torch.allclose(a[0, 20:], b[0, 20:])


def test_learned_positions_tell_equal_bytes_apart() -> None:
    a = LearnedPositionsGPT(MODEL, 256)(torch.full((1, 32), 7))
    assert not torch.allclose(a[0, 3], a[0, 4])


def test_held_out_bits_are_a_mean_over_all_windows(text: corpus.Corpus) -> None:
    size = Size(MODEL, held_out_windows=40)
    training = Training(RunConfig(1, schedule_for("wsd", 1), 0, size, "cpu", 1, ""), text)
    losses = [float(training.model.loss(*batch).detach()) for batch in text.held_out_batches(40, 1, 32)]
    assert training.held_out_bits() == pytest.approx(sum(losses) / 40 / math.log(2), rel=1e-5)


def test_smoothing() -> None:
    assert picture.smoothed([], 5) == []
    assert picture.smoothed([1.0, 2.0, 3.0, 8.0], 1) == [1.0, 2.0, 3.0, 8.0]
    assert picture.smoothed([1.0, 2.0, 3.0, 8.0, 9.0], 3) == pytest.approx([1.0, 2.0, 13 / 3, 20 / 3, 8.5])


def test_share() -> None:
    assert StepCost(3.0, 1.0, 2.0).of(1.0) == "25.00%  1000.000 ms"
