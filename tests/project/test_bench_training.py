"""Whole training steps in `python -m benchmarks`: that every loop does the same, and what comes of the times.

No times are asserted: a test machine is never quiet. Captured steps run eagerly on the device that stands for a GPU.
"""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu, quick_benchmark, refuse_capture  # noqa: F401  # the second is a fixture
from gpt.model import GPTConfig
from gpt.run import Size

from benchmarks import measure, training
from benchmarks.__main__ import main
from benchmarks.cases import (
    CAPTURED,
    CUDA,
    EAGER,
    NEXUS_EAGER,
    TORCH_FUSED_LOOP,
    TORCH_GRAPH,
    TORCH_LOOP,
    TRAINING_CASES,
    TRAINING_PEERS,
)
from benchmarks.report import LeftOut, Row
from benchmarks.timing import Device
from benchmarks.training import CHECKED_STEPS, make_batches, make_model

MLP, GPT, GPT2 = (replace(case, loop_steps=1) for case in TRAINING_CASES.values())


@pytest.mark.parametrize(
    ("case", "tensors", "elements"), [(MLP, 4, 203_530), (GPT, 63, 1_024_384), (GPT2, 148, 124_439_808)]
)
def test_sizes(case, tensors: int, elements: int) -> None:
    device = Device()
    device.where = torch.device("meta")
    parameters = list(make_model(case, device).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (tensors, elements)


def test_the_host_is_left_its_random_numbers() -> None:
    before = torch.get_rng_state()
    first, second = (make_model(MLP) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for (a, b), (c, d) in zip(*(make_batches(GPT) for _ in range(2)), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert torch.equal(a[:, 1:], b[:, :-1])


def test_on_a_cpu_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CPU_LIMIT_S", 1e-6)
    rows = list(measure.measure(MLP, 100))
    assert [(row.job, row.peer) for row in rows] == [(EAGER, TORCH_LOOP), (EAGER, TORCH_FUSED_LOOP)]
    for row in rows:
        assert isinstance(row, Row), row.reason
        assert (row.case, row.pairs, row.loop, row.host, row.bytes_moved) == (MLP.name, 8, None, None, None)
        assert 0 < row.difference < 1e-4
        assert row.time.nexus.median > 0


@pytest.mark.parametrize("case", [MLP, GPT, GPT2], ids=lambda case: case.name)
def test_on_a_gpu(case, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Size(GPTConfig(layers=2, heads=2, width=16, context=32), batch=2)
    monkeypatch.setattr(training, "SIZES", dict.fromkeys(training.SIZES, tiny))
    monkeypatch.setattr(training, "VOCABULARIES", dict.fromkeys(training.SIZES, 64))
    monkeypatch.setattr(training, "ON_CPU", {})
    captured, autocast = [], set()
    loss_of = training.loss_of

    def watched(*arguments):
        autocast.add(torch.is_autocast_enabled("cpu"))
        return loss_of(*arguments)

    def capture(step, optimizer):
        captured.append(optimizer.backend)
        return step

    monkeypatch.setattr(training, "loss_of", watched)
    monkeypatch.setattr(training, "capture_train_step", capture)
    rows = {(row.job, row.peer): row for row in measure.measure(case, 1, FakeGpu())}
    assert list(rows) == [(job, peer) for job in (CAPTURED, EAGER) for peer in TRAINING_PEERS[CUDA, job]]
    for row in rows.values():
        assert isinstance(row, Row), row.reason
        assert (row.time.nexus.median, row.host.peer.median) == (10.0, 5.0)
        assert row.loop.nexus.median > 0 < row.loop.ratio.median
        assert row.difference < (1e-2 if case is GPT2 else 1e-4)
        assert row.dtype == ("float32, autocast to bfloat16" if case is GPT2 else "float32")
    assert rows[CAPTURED, NEXUS_EAGER].difference == 0.0
    assert captured == [row.backend for row in rows.values() if row.job == CAPTURED]
    assert autocast == {case is GPT2}


@pytest.mark.parametrize("name", [TORCH_LOOP, TORCH_FUSED_LOOP, TORCH_GRAPH, NEXUS_EAGER])
def test_every_loop_does_the_same(name: str) -> None:
    device = FakeGpu()
    ours, theirs = training.nexus(MLP, CAPTURED, device), training.peer(MLP, CAPTURED, name, device)
    assert device.captured == (name == TORCH_GRAPH)
    a, b = ours.read_losses(40), theirs.read_losses(40)
    assert a == pytest.approx(b, rel=1e-4)
    assert a[-1] < 0.8 * a[0]
    for p, q, r in zip(ours.params, theirs.params, make_model(MLP).parameters(), strict=True):
        assert (p - q).norm() < 1e-3 * (p - r).norm()


@pytest.mark.parametrize("wrong", ["rate", "loss"])
def test_a_loop_that_does_something_else_is_found_out(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong == "rate":
        monkeypatch.setattr(training, "SCHEDULE", 1.02 * training.SCHEDULE)
    else:  # no longer finite once the first steps are done
        update, calls = training.Trainee.update, []

        def diverging(self, *arguments, **options):
            calls.append(self)
            return update(self, *arguments, **options) * (float("nan") if len(calls) > 2 * CHECKED_STEPS else 1.0)

        monkeypatch.setattr(training.Trainee, "update", diverging)
    row = next(measure.measure(MLP, 1))
    assert isinstance(row, LeftOut)
    assert row.failed
    assert "train-mlp, training step: the losses of nexus and of its peer (torch loop) differ by" in row.reason
    assert ("by nan of" in row.reason) == (wrong == "loss")


def test_a_peer_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_capture(monkeypatch)
    (left_out,) = (row for row in measure.measure(MLP, 1, FakeGpu()) if isinstance(row, LeftOut))
    assert (left_out.peer, left_out.failed) == (TORCH_GRAPH, False)
    assert left_out.reason.startswith("RuntimeError: operation not permitted")


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_picture_of_training_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "train-mlp", "--repeats", "1", "--picture", str(tmp_path / "speed.png")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed-training.png"]
    assert "steps a second" in capsys.readouterr().out
