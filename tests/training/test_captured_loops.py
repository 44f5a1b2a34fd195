"""The demo, the benchmark's models and the example in graphs of graphs_on_cpu.py: nothing in them refuses capture."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from cuda_on_cpu import NAME
from fake_gpu import FakeGpu
from gpt import corpus, train
from gpt.model import GPTConfig
from gpt.run import RunConfig, Size, schedule_for
from gpt.train import Training
from graphs_on_cpu import Graphs

from benchmarks import training as loops
from benchmarks.cases import CAPTURED, EAGER, TRAINING_CASES
from nexus.optim import FusedAdamW

pytestmark = pytest.mark.xdist_group("demo")  # one corpus for all

TINY = Size(GPTConfig(layers=1, heads=2, width=8, context=16), 2, held_out_windows=4)
STEPS = 23
WARMUP = 3  # plain steps before a capture


def training(text: corpus.Corpus, steps: int = STEPS) -> Training:
    return Training(RunConfig(steps, schedule_for("wsd", STEPS), 0, TINY, "cpu", 1, ""), text)


def same(a: dict[str, object], b: dict[str, object]) -> None:
    for key in ("losses", "rates", "grad_norms"):
        assert torch.equal(a[key], b[key]), key
    for name, value in a["model"].items():
        assert torch.equal(value, b["model"][name]), name


def test_the_demo(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, it has the numbers of an eager run; also where it goes on from a checkpoint and captures anew."""
    text = corpus.load(torch.device("cpu"))
    monkeypatch.setattr(train, "FusedAdamW", partial(FusedAdamW, backend=NAME))
    with monkeypatch.context() as patch:
        patch.setattr(train, "capture_train_step", lambda step, optimizer: lambda *batch: step(*batch).detach())
        eager = training(text)
        eager.train(lambda: False, lambda *_: None)
    assert not graphs.events
    shown = []
    first = training(text)
    first.train(lambda: first.step == 13, lambda *numbers: shown.append(numbers))
    saved = first.state_dict()
    assert saved["rates"].tolist() == schedule_for("wsd", STEPS).values(0, 13)
    second = training(text)
    second.load_state_dict(saved)
    second.train(lambda: False, lambda *numbers: shown.append(numbers))
    assert graphs.events.count("capture") == 2
    assert graphs.events.count("replay") == STEPS - 2 * WARMUP
    same(eager.state_dict(), second.state_dict())
    assert STEPS < train.SMOOTHED
    assert [(step, loss) for step, loss, _ in shown] == [(s, float(second.losses[:s].mean())) for s in (10, 20, 23)]


@pytest.mark.parametrize("case", TRAINING_CASES.values(), ids=lambda case: case.name)
def test_the_benchmarks_models(case, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "FusedAdamW", partial(FusedAdamW, backend=NAME))
    monkeypatch.setattr(loops, "MLP_WIDTHS", (20, 12, 10))
    monkeypatch.setattr(loops, "SIZES", dict.fromkeys(loops.SIZES, TINY))
    monkeypatch.setattr(loops, "VOCABULARIES", dict.fromkeys(loops.SIZES, 64))
    monkeypatch.setattr(loops, "ON_CPU", {})
    captured, eager = (loops.nexus(case, job, FakeGpu()) for job in (CAPTURED, EAGER))
    assert captured.read_losses(8) == eager.read_losses(8)
    assert graphs.events.count("replay") == 8 - WARMUP


def test_the_example(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    examples = Path(__file__).resolve().parents[2] / "examples"
    eager = runpy.run_path(str(examples / "nexus_eager.py"))["losses"]
    monkeypatch.setattr("nexus.optim.FusedAdamW", partial(FusedAdamW, backend=NAME))
    captured = runpy.run_path(str(examples / "nexus_captured.py"))["losses"]
    assert graphs.events.count("replay") == 300 - WARMUP
    assert captured == pytest.approx(eager, rel=1e-3)
