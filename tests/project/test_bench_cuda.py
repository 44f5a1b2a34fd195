"""The benchmark on a GPU: its way with a device that only looks like one, and what `Cuda` does where there is one."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fake_gpu import FakeGpu, quick_benchmark, refuse_capture  # noqa: F401  # the second is a fixture

from benchmarks import __main__ as command
from benchmarks import cases, contestants, table, timing
from benchmarks.cases import BFLOAT16, CAPTURABLE, CLIP_STEP_SCHEDULE, COPY, CUDA, FOREACH, FUSED, STEP, Case
from benchmarks.measure import measure
from benchmarks.peers import PEERS
from benchmarks.report import LeftOut, Row

PEERS_OF_SMALL = (FUSED, CAPTURABLE, FOREACH, cases.NEXUS_TRITON, COPY)
SMALL = Case("small", "three small tensors", ((40,), (7, 5), (1,)), 3, 2, cuda_peers=PEERS_OF_SMALL)


def by_peer(case: Case) -> dict[tuple[str, str], Row | LeftOut]:
    return {(row.job, row.peer): row for row in measure(case, 3, FakeGpu())}


def test_rows() -> None:
    rows = by_peer(SMALL)
    assert set(rows) == {(job, peer) for job in SMALL.jobs for peer in SMALL.cuda_peers}
    for job in SMALL.jobs:
        triton = rows[job, cases.NEXUS_TRITON]  # needs a real GPU: the others go on without it
        assert isinstance(triton, LeftOut)
        assert not triton.failed
        for peer in (FUSED, CAPTURABLE, FOREACH, COPY):
            row = rows[job, peer]
            assert isinstance(row, Row), row.reason
            assert (row.time.nexus.median, row.time.ratio.median, row.host.peer.median) == (10.0, 1.0, 5.0)
            assert (row.replay.nexus.median, row.replay_host.nexus.median) == (10.0, 5.0)
            assert (row.difference is None) if peer == COPY else (row.difference < 1e-3)
            assert row.bytes_moved == 76 * (28 if job == STEP else 32)
        assert rows[job, CAPTURABLE].replay.ratio.median == 1.0
        assert rows[job, COPY].replay_host.ratio.median == 1.0
        assert rows[job, FUSED].replay.peer is None  # a float rate would freeze in the graph


def test_the_host_schedules_beside_a_graph() -> None:
    """With a rate that a scheduler on the host writes between replays, the peer does what it does step by step."""
    ours, theirs = (contestants.peer(SMALL, CLIP_STEP_SCHEDULE, CAPTURABLE) for _ in range(2))
    for _ in range(5):
        ours.call()
        theirs.in_graph()
        theirs.beside_graph()
    assert ours.difference(theirs) == 0.0
    assert contestants.peer(SMALL, STEP, CAPTURABLE).beside_graph is None
    assert contestants.peer(SMALL, STEP, FUSED).in_graph is None


def test_bfloat16() -> None:
    case = Case("half", "", ((1000,),) * 3, 100, 2, cuda_peers=(FUSED, FOREACH), dtype=BFLOAT16)
    for row in measure(case, case.repeats, FakeGpu()):
        assert isinstance(row, Row), row.reason
        assert row.pairs == 30  # more, and the peers' bfloat16 moments would stand still
        assert row.remark.startswith("its moments are bfloat16")
        assert row.bytes_moved == 3000 * (22 if row.job == STEP else 24)
    ours = contestants.nexus(case, STEP)
    ours.call()
    assert ours.params[0].dtype == torch.bfloat16
    assert ours.optimizer.state[ours.params[0]]["exp_avg"].dtype == torch.float32


def test_a_failing_capture_is_a_remark(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_capture(monkeypatch)
    row = by_peer(SMALL)[STEP, FUSED]
    assert isinstance(row, Row)
    assert row.replay is None
    assert row.remark.startswith("nexus was not captured: RuntimeError: operation not permitted")


def test_the_capturable_peer_has_a_rate_of_its_own_in_each_group() -> None:
    groups = [{"params": [torch.zeros(1)]} for _ in range(2)]
    optimizer = PEERS[CAPTURABLE].make(groups, torch.device("cpu"))
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert isinstance(first, torch.Tensor)
    assert first is not second


@pytest.mark.parametrize("name", [cases.OPTIMI, cases.TORCHAO, cases.APEX])
def test_what_is_not_installed_is_left_out(name: str) -> None:
    if find_spec(PEERS[name].module.partition(".")[0]):
        pytest.skip(f"{name} is installed")
    case = Case("small", "", SMALL.shapes, 1, 1, jobs=(STEP,), cuda_peers=(name,))
    (left_out,) = measure(case, 1, FakeGpu())
    assert isinstance(left_out, LeftOut)
    assert not left_out.failed
    assert "not installed" in left_out.reason


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """Of steps and of whole training steps, each with its table and its picture."""
    monkeypatch.setattr(command, "_device", lambda wanted: FakeGpu())
    draws = find_spec("matplotlib") is not None
    out = ["--out", str(tmp_path), *(["--picture", str(tmp_path / "speed.png")] if draws else [])]
    chosen = ["--case", "tiny", "--case", "train-mlp"]
    assert command.main(["--device", "cuda", *chosen, "--repeats", "1", *out]) == 0
    (path,) = tmp_path.glob("*.json")
    assert path.name.endswith("_nvidia-fake-1.json")
    data = json.loads(path.read_text())
    assert (data["metadata"]["gpu"], data["metadata"]["device"], data["host"]) == ("NVIDIA Fake 1", "cuda", [])
    for row in data["rows"]:
        assert row["host"]["peer"]["median"] == 5.0
        assert row.keys() == data["rows"][0].keys()
        assert (row["loop"] is not None) == (row["case"] == "train-mlp")
    training = [cases.TORCH_LOOP, cases.TORCH_GRAPH, cases.NEXUS_EAGER, cases.TORCH_LOOP]
    assert [row["peer"] for row in data["rows"]] == [*[FUSED, CAPTURABLE, FOREACH] * 2, *training]
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["speed-training.png", "speed.png"] * draws
    printed = capsys.readouterr().out
    places = [printed.index(words) for words in (table.heading(CUDA), "\ntiny", table.heading(CUDA, training=True))]
    assert places == sorted(places)
    assert all("10.0 / 10.0" in part for part in (printed[: places[2]], printed[places[2] :]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys) -> None:
    assert command.main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("python -m benchmarks: --device cuda cannot be had: t")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_real_device() -> None:
    device = timing.Cuda()
    values = torch.ones(1 << 24, device=device.where)
    add = lambda: values.add_(1.0)  # noqa: E731
    device.sample(add)
    sample = device.sample(add)
    assert 1.0 < sample.us < 1e4
    assert 0.0 < sample.host_us < 1e4
    before = float(values[0])
    replay = device.capture(add, add)
    replay()
    device.wait()
    assert float(values[0]) == before + timing.CAPTURE_WARMUP + 1
    assert {"gpu", "driver", "cuda", "peers"} <= set(device.metadata())
