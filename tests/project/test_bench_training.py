"""Whole training steps in `python -m benchmarks`: that every loop does the same, and what comes of the times.

No times are asserted: a test machine is never quiet. Captured steps run eagerly on the device that stands for a GPU.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu
from gpt.model import GPTConfig
from gpt.run import Size

from benchmarks import cli, models, table, trainees, training
from benchmarks.cases import CPU, CUDA
from benchmarks.cli import main
from benchmarks.models import GPT2, GPT2Config, make_batches, make_model
from benchmarks.peers import PEAK_LR
from benchmarks.rows import LeftOut, Row
from benchmarks.timing import Cpu
from benchmarks.training import CHECKED_STEPS, measure_training
from benchmarks.training_cases import (
    CAPTURED,
    EAGER,
    NEXUS_EAGER,
    PEERS,
    TORCH_FUSED_LOOP,
    TORCH_GRAPH,
    TORCH_LOOP,
    TRAINING_CASES,
)

MLP, GPT, GPT_2 = TRAINING_CASES.values()
TINY_GPT2 = GPT2Config(layers=2, heads=2, width=16, vocabulary=64, context=32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("case", "tensors", "elements"), [(MLP, 4, 203_530), (GPT, 63, 1_024_384)])
def test_sizes(case, tensors: int, elements: int) -> None:
    parameters = list(make_model(case, torch.device("cpu")).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (tensors, elements)


def test_gpt2_is_the_one_of_124_million_parameters() -> None:
    with torch.device("meta"):
        parameters = list(GPT2(GPT2Config()).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == (148, 124_439_808)


def test_gpt2_sees_only_the_past_and_its_place() -> None:
    torch.manual_seed(0)
    model = GPT2(TINY_GPT2)
    tokens = torch.full((1, 32), 7)
    changed = tokens.clone()
    changed[0, 20] = 8
    a, b = model(tokens), model(changed)
    assert a.shape == (1, 32, 64)
    assert torch.equal(a[0, :20], b[0, :20])
    assert not torch.allclose(a[0, 20:], b[0, 20:])
    assert not torch.allclose(a[0, 3], a[0, 4])


def test_the_host_is_left_its_random_numbers() -> None:
    before = torch.get_rng_state()
    first, second = (make_model(MLP, torch.device("cpu")) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for (a, b), (c, d) in zip(*(make_batches(GPT, torch.device("cpu")) for _ in range(2)), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
        assert torch.equal(a[:, 1:], b[:, :-1])


def test_the_peers_rates_are_those_of_the_schedule() -> None:
    for step in (0, 1, 5, 9, 10, 11, 1000):
        assert PEAK_LR * trainees.warmup(step) == pytest.approx(trainees.SCHEDULE(step), rel=1e-12)


def test_on_a_cpu() -> None:
    rows = list(measure_training(MLP, 2))
    assert [(row.job, row.peer) for row in rows] == [(EAGER, TORCH_LOOP), (EAGER, TORCH_FUSED_LOOP)]
    for row in rows:
        assert isinstance(row, Row), row.reason
        assert (row.case, row.pairs, row.loop, row.host, row.bytes_moved) == (MLP.name, 2, None, None, None)
        assert 0 < row.difference < 1e-4
        assert row.time.nexus.median > 0


@pytest.mark.parametrize("case", [MLP, GPT])
def test_on_a_gpu(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "Size", lambda: Size(GPTConfig(layers=1, heads=2, width=16, context=32)))
    rows = {(row.job, row.peer): row for row in measure_training(replace(case, loop_steps=1), 1, FakeGpu())}
    assert list(rows) == [(job, peer) for job in (CAPTURED, EAGER) for peer in PEERS[CUDA, job]]
    for row in rows.values():
        assert isinstance(row, Row), row.reason
        assert (row.time.nexus.median, row.host.peer.median) == (10.0, 5.0)
        assert row.loop.nexus.median > 0 < row.loop.ratio.median
        assert row.difference < 1e-4
    assert rows[CAPTURED, NEXUS_EAGER].difference == 0.0


def test_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "GPT2Config", lambda: TINY_GPT2)
    monkeypatch.setattr(models, "_token_sizes", lambda case, device: (2, 32, 64))
    seen = []
    loss_of = trainees.loss_of

    def watched(model, inputs, targets):
        seen.append(torch.is_autocast_enabled("cpu"))
        return loss_of(model, inputs, targets)

    monkeypatch.setattr(trainees, "loss_of", watched)
    for row in measure_training(GPT_2, 1, FakeGpu()):
        assert isinstance(row, Row), row.reason
        assert row.dtype == "float32, autocast to bfloat16"
        assert row.difference < 1e-2
    assert all(seen)


@pytest.mark.parametrize("name", [TORCH_LOOP, TORCH_FUSED_LOOP, TORCH_GRAPH, NEXUS_EAGER])
def test_every_loop_does_the_same(name: str) -> None:
    device = FakeGpu()
    ours, theirs = trainees.nexus(MLP, CAPTURED, device), trainees.peer(MLP, CAPTURED, name, device)
    assert device.captured == (name == TORCH_GRAPH)
    before = make_model(MLP, device.where)
    a, b = ours.read_losses(40), theirs.read_losses(40)
    assert a == pytest.approx(b, rel=1e-4)
    assert a[-1] < 0.8 * a[0]
    for p, q, r in zip(ours.model.parameters(), theirs.model.parameters(), before.parameters(), strict=True):
        assert (p - q).norm() < 1e-3 * (p - r).norm()


def test_a_loop_that_does_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainees, "SCHEDULE", 1.02 * trainees.SCHEDULE)
    for row in measure_training(MLP, 1):
        assert isinstance(row, LeftOut)
        assert row.failed
        assert "train-mlp, training step: the losses of nexus and of its peer (torch loop" in row.reason


def test_a_peer_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self, warm, body):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(FakeGpu, "capture", refuse)
    rows = list(measure_training(replace(MLP, loop_steps=1), 1, FakeGpu()))
    (left_out,) = (row for row in rows if isinstance(row, LeftOut))
    assert (left_out.peer, left_out.failed) == (TORCH_GRAPH, False)
    assert left_out.reason.startswith("RuntimeError: operation not permitted")


def test_a_loss_that_is_not_finite_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    call, calls = trainees.Trainee.call, 0

    def diverging(self):
        nonlocal calls
        calls += 1
        return call(self) * (float("nan") if calls > 2 * CHECKED_STEPS else 1.0)

    monkeypatch.setattr(trainees.Trainee, "call", diverging)
    row = next(iter(measure_training(MLP, 1)))
    assert isinstance(row, LeftOut)
    assert row.failed
    assert "no longer finite" in row.reason


def test_a_captured_step_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []
    monkeypatch.setattr(
        trainees, "capture_train_step", lambda step, optimizer: captured.append(optimizer.backend) or step
    )
    rows = list(measure_training(replace(MLP, loop_steps=1), 1, FakeGpu()))
    assert captured == [row.backend for row in rows if row.job == CAPTURED]


def test_which_cases_run() -> None:
    on_cpu, on_cuda = ([case.name for case in cli._cases(None, device)] for device in (CPU, CUDA))
    assert on_cpu[-2:] == ["train-mlp", "train-gpt"]
    assert on_cuda[:5] == ["billion", "billion-bf16", "train-mlp", "train-gpt", "train-gpt2"]
    assert cli._cases(["train-gpt2"], CPU) == [GPT_2]


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "_device", lambda wanted: FakeGpu())
    draws = find_spec("matplotlib") is not None
    out = ["--out", str(tmp_path), *(["--picture", str(tmp_path / "speed.png")] if draws else [])]
    cases = ["--case", "tiny", "--case", "train-mlp"]
    assert main(["--device", "cuda", *cases, "--repeats", "1", *out]) == 0
    data = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = [row for row in data["rows"] if row["case"] == "train-mlp"]
    assert [row["peer"] for row in rows] == [TORCH_LOOP, TORCH_GRAPH, NEXUS_EAGER, TORCH_LOOP]
    for row in rows:
        assert set(row["loop"]) == {"nexus", "peer", "ratio"}
        assert set(row) == set(data["rows"][0])
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["speed-training.png", "speed.png"] * draws
    printed = capsys.readouterr().out
    assert printed.index(table.CUDA_HEADING) < printed.index("tiny") < printed.index(table.training_heading(CUDA))
    assert "10.0 / 10.0" in printed[printed.index("train-mlp") :]


@pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")
def test_picture_of_training_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(tmp_path / "speed.png")
    assert main(["--case", "train-mlp", "--repeats", "1", "--picture", picture]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["speed-training.png"]
    assert "steps a second" in capsys.readouterr().out


def test_time_is_limited_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CPU_LIMIT_S", 1e-6)
    assert [row.pairs for row in measure_training(MLP, 100, Cpu())] == [8, 8]
