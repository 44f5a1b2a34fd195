"""`python -m benchmarks`: what is compared, that it is compared fairly, and what is printed and written.

No times are asserted: a test machine is never quiet.
"""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fake_gpu import quick_benchmark  # noqa: F401  # a fixture

from benchmarks import __main__ as command
from benchmarks import busy, contestants, host, report
from benchmarks.__main__ import main
from benchmarks.cases import (
    CASES,
    CLIP_STEP_SCHEDULE,
    COPY,
    CPU,
    CUDA,
    FOR_LOOP,
    FOREACH,
    FUSED,
    NO_AVERAGE,
    OTHERS,
    SEPARATE_AVERAGE,
    STEP,
    Case,
)
from benchmarks.contestants import factors, rate_scale
from benchmarks.measure import measure
from benchmarks.peers import MAX_GRAD_NORM, PEAK_LR, PEERS, SCHEDULE
from benchmarks.report import LeftOut, Row, Spread
from benchmarks.timing import PROCESSOR, Device, interleaved

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
SMALL = Case("small", "three small tensors", ((40,), (7, 5), (1,)), 3, 2, peers=(FUSED, FOREACH, FOR_LOOP, COPY))
GROUPS = Case("dealt", "three groups", ((17,),) * 6, 3, 2, groups=3)


@pytest.mark.parametrize(
    ("name", "tensors", "elements", "groups"),
    [
        ("tiny", 148, 9_472, 1),
        ("gpt", 40, 660_608, 1),
        ("deep", 148, 632_704, 1),
        ("gpt2", 148, 124_439_808, 1),
        ("groups", 100, 100_000, 100),
        ("many", 1000, 1_000_000, 1),
        ("ten", 10, 10_000, 1),
        ("ten-thousand", 10_000, 10_000_000, 1),
        ("billion", 292, 1_017_302_272, 1),
        ("billion-bf16", 292, 1_017_302_272, 1),
    ],
)
def test_sizes(name: str, tensors: int, elements: int, groups: int) -> None:
    case = CASES[name]
    assert (len(case.shapes), case.elements, case.groups) == (tensors, elements, groups)
    assert case.bytes_moved(STEP) == elements * (22 if name == "billion-bf16" else 28)
    assert case.bytes_needed(CUDA) < 100e9
    if elements < 2_000_000:
        grads = [param.grad for param in contestants.make_params(case.shapes)]
        assert torch.nn.utils.get_total_norm(grads) > MAX_GRAD_NORM  # so that every gradient is clipped


def test_which_cases_run() -> None:
    on_cpu, on_cuda = ([case.name for case in command._cases(None, device)] for device in (CPU, CUDA))
    steps, training = ["tiny", "gpt", "deep", "gpt2", "groups"], ["train-mlp", "train-gpt"]
    assert on_cpu == [*steps, "many", *training]
    assert on_cuda == ["billion", "billion-bf16", "many", *training, "ten", "ten-thousand", *steps, "train-gpt2"]
    assert [case.name for case in command._cases(["train-gpt2", "tiny", "host"], CPU)] == ["train-gpt2", "tiny"]


def test_an_average_costs_its_bytes_and_is_set_beside_a_pass_of_its_own() -> None:
    assert CASES["gpt2-average"].bytes_moved(STEP) == CASES["gpt2"].elements * 36
    case = replace(SMALL, jobs=(STEP,), peers=CASES["gpt2-average"].peers, average=True)
    rows = list(measure(case, repeats=3))
    assert [row.peer for row in rows] == [NO_AVERAGE, SEPARATE_AVERAGE]
    assert all(row.difference < 1e-3 for row in rows)
    separate = contestants.peer(case, STEP, SEPARATE_AVERAGE)
    separate.call()
    assert separate.optimizer is not None
    assert not separate.optimizer.param_groups[0]["average"]


@pytest.mark.parametrize("case", [SMALL, GROUPS], ids=lambda case: case.name)
def test_rows(case: Case) -> None:
    rows = list(measure(case, repeats=3))
    assert [(row.job, row.peer) for row in rows] == [(job, peer) for job in case.jobs for peer in case.peers]
    for row in rows:
        assert (row.case, row.tensors, row.elements, row.pairs) == (case.name, len(case.shapes), case.elements, 3)
        for spread in (row.time.nexus, row.time.peer, row.time.ratio):
            assert 0 < spread.p20 <= spread.median <= spread.p80 < math.inf
        assert row.peer == COPY or row.difference < 1e-3
        assert row.backend in ("native", "torch")


@pytest.mark.parametrize("job", [STEP, CLIP_STEP_SCHEDULE])
@pytest.mark.parametrize("peer", [FUSED, FOREACH, FOR_LOOP])
def test_both_do_the_same(job: str, peer: str) -> None:
    ours, theirs = contestants.nexus(GROUPS, job), contestants.peer(GROUPS, job, peer)
    for _ in range(20):
        ours.call()
        theirs.call()
    assert ours.difference(theirs) < 1e-4
    assert not torch.equal(theirs.params[0], theirs.first_before)


def test_the_peers_rates_are_those_of_the_schedule() -> None:
    for index, factor in enumerate(factors(100)):
        scaled = rate_scale(index, 100) * SCHEDULE
        for step in (0, 1, 5, 9, 10, 11, 5000):
            assert PEAK_LR * factor(step) == pytest.approx(scaled(step), rel=1e-12)


@pytest.mark.parametrize(("wrong", "by"), [("rate", "2.0e-02"), ("nothing", "1.0e+00")])
def test_a_contestant_that_does_something_else_is_found_out(wrong: str, by: str, monkeypatch) -> None:
    right = contestants.nexus_optimizer

    def optimizer(*arguments):
        made = right(*arguments)
        if wrong == "rate":
            made.param_groups[0]["lr"] *= 1.02
        else:
            made.step = lambda: None
        return made

    monkeypatch.setattr(contestants, "nexus_optimizer", optimizer)
    rows = [row for row in measure(replace(SMALL, jobs=(STEP,)), repeats=3) if row.peer != COPY]
    assert len(rows) == 3
    for row in rows:
        assert row.failed
        assert f"small, step: the parameters of nexus and of its peer ({row.peer}) differ by {by}" in row.reason


def test_what_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    right = contestants.peer

    def peer(case, job, name, device):
        if name == FOREACH:
            raise RuntimeError("out of\nmemory")
        return right(case, job, name, device)

    monkeypatch.setattr(contestants, "peer", peer)
    rows = list(measure(GROUPS, repeats=1))
    assert [type(row) for row in rows] == [Row, LeftOut, Row] * 2
    assert (rows[1].reason, rows[1].failed) == ("RuntimeError: out of memory", False)

    def broken(*args):
        raise ValueError("nexus is broken")

    monkeypatch.setattr(contestants, "peer", right)
    monkeypatch.setattr(contestants, "nexus_optimizer", broken)
    out = tmp_path / "rows.json"
    assert main(["--case", "tiny", "--repeats", "1", "--out", str(out)]) == 1
    data = json.loads(out.read_text())
    assert (data["complete"], data["rows"], len(data["left_out"])) == (True, [], 6)
    assert capsys.readouterr().err.count("left out, ValueError: nexus is broken") == 6


def test_a_copy_moves_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(contestants, "MAX_COPIED", 100)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copied.append((self.nbytes, source.nbytes)))
    contestants.copy(SMALL, STEP)()
    assert sum(map(sum, copied)) == SMALL.bytes_moved(STEP) // 8 * 8
    assert len(copied) > 2


def test_turns_alternate_until_the_time_is_over() -> None:
    calls: list[str] = []
    pairs = interleaved(lambda: calls.append("a"), lambda: calls.append("b"), 6)
    assert len(pairs) == 6
    assert "".join(calls).startswith("abbaabba")
    assert calls.count("a") == calls.count("b") > 6
    for limit_s, count in ((None, 30), (0.0, 8)):
        assert len(interleaved(lambda: 1, lambda: 2, 30, limit_s)) == count


def test_spread() -> None:
    assert Spread.of([5.0]) == Spread(5.0, 5.0, 5.0)
    assert Spread.of([4.0, 0.0, 1.0, 2.0, 3.0, 5.0]) == Spread(2.5, 1.0, 4.0)


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", replace(CASES["tiny"], shapes=((64,),) * 3))
    monkeypatch.setattr(host, "MANY", 120)
    argv = ["--case", "tiny", "--case", "host", "--repeats", "1", "--threads", "2", "--out", str(tmp_path)]
    picture = ["--picture", str(tmp_path / "speed.png")] if find_spec("matplotlib") else []
    assert main([*argv, *picture]) == 0
    assert torch.get_num_threads() == 1
    out, err = capsys.readouterr()
    assert err == ""
    (path,) = tmp_path.glob("*.json")
    assert str(path) in out
    data = json.loads(path.read_text())
    assert path.name == report.file_name(data["metadata"]["date"], data["metadata"]["cpu"])
    assert (data["format"], data["complete"], data["metadata"]["threads"]) == (2, True, 2)
    old = json.loads((RESULTS / "2026-11-23_amd-epyc.json").read_text())
    assert old.keys() <= data.keys()
    assert old["metadata"].keys() <= data["metadata"].keys()
    assert [row["peer"] for row in data["rows"]] == [FUSED, FOREACH, FOR_LOOP] * 2
    for row in data["rows"]:
        types = {(key, type(value)) for key, value in row.items()}
        assert {(key, type(value)) for key, value in old["rows"][0].items()} <= types
        assert row["nexus_us"] == row["nexus_spread"]["median"] > 0
        assert row["peer_us"] == row["peer_spread"]["median"] > 0
    table = out[out.index("case") :].split("\n\n")[0].splitlines()
    assert [line.split()[:2] for line in table[1:]] == [["tiny", job] for job in ["step"] * 3 + ["clip"] * 3]
    values = {row["what"]: row["value"]["median"] for row in data["host"]}
    assert len(values) == len(data["host"]) == 12
    assert all(what in out and math.isfinite(value) for what, value in values.items())
    assert values["LambdaLR.step(), 100 groups, float rates"] > 0
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in tmp_path.glob("*.png"))
    assert len([*tmp_path.iterdir()]) == 1 + len(picture) // 2


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ("--case huge", "'huge'"),
        ("--repeats 0", "'0'"),
        ("--repeats many", "'many'"),
        ("--threads -1", "'-1'"),
        ("--device tpu", "'tpu'"),
        ("--case billion", "billion is for cuda"),
        ("--quickly", "--quickly"),
        ("tiny", "tiny"),
        ("--out no/such/folder/rows.json", "no/such/folder"),
        ("--picture .", "folder"),
        ("--picture speed.jpg", "must end in .png, .svg, .pdf, got 'speed.jpg'"),
        ("--case host --picture speed.png", "host"),
    ],
)
def test_nonsense(argv: str, word: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(argv.split())
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("python -m benchmarks")
    assert word in err
    assert [*tmp_path.iterdir()] == []


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path) -> None:
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", interrupted)
    assert main(["--case", "tiny", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nStopped; the rows above are written.\n"


def test_a_case_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(Device, "free_bytes", lambda self: 1000)
    assert main(["--case", "tiny"]) == 0
    assert "tiny: left out, it needs 0.0 GB of memory" in capsys.readouterr().out


def test_the_commit_is_that_of_this_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (report.ROOT / "benchmarks" / "README.md").is_file()
    if (report.ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{12}\+?", report.metadata(PROCESSOR)["commit"])
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setenv("NEXUS_COMMIT", "abc")
    assert report.commit() == "abc"


def test_a_quick_run_is_of_few_cases_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(command, "_measure", lambda case, args, device, results: print(f"[{case.name}]"))
    monkeypatch.setattr(command, "measure_host", lambda repeats: [])
    assert main(["--quick"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^\[(.*)\]$", out, re.MULTILINE) == ["tiny", "gpt", "groups", "train-mlp"]
    assert "\nLeft out to be quick: deep, gpt2, many, train-gpt, and most repeats.\n" in out


def test_the_backend_that_is_timed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "tiny", replace(CASES["tiny"], shapes=((64,),) * 3))
    for backend in ("torch", "reference"):
        (row, *_) = measure(replace(SMALL, jobs=(STEP,)), 2, backend=backend)
        assert (row.backend, row.difference < 1e-3) == (backend, True)
    assert main(["--backend", "torch", "--case", "tiny", "--repeats", "1"]) == 0
    assert "host time" not in capsys.readouterr().out
    for argv, words in (
        (["--case", "train-mlp"], "leave out --case train-mlp"),
        (["--case", "host"], "leave out --case host"),
    ):
        assert main(["--backend", "torch", *argv]) == 2
        assert words in capsys.readouterr().err
    assert main(["--backend", "cuda", "--case", "tiny"]) == 2
    assert "backend='cuda' runs on cuda" in capsys.readouterr().err


def test_a_busy_core_is_left_when_the_run_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    started = []

    class Noted(busy.subprocess.Popen):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            if busy._SPIN in args[0]:
                started.append(self)

    monkeypatch.setattr(busy.subprocess, "Popen", Noted)

    def measured(*args) -> None:
        (process,) = started
        assert process.poll() is None
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_measure", measured)
    assert main(["--busy", "--case", "tiny", "--out", str(tmp_path)]) == 130
    assert started[0].poll() is not None
    assert "Another process keeps core" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="only Linux tells")
def test_a_busy_core_ends_with_its_parent() -> None:
    with busy.busy_core() as core:
        assert core in os.sched_getaffinity(0)
    command = [sys.executable, "-c", busy._SPIN, str(core)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert os.sched_getaffinity(process.pid) == {core}
        process.stdin.close()  # as the system does when the parent is gone
        assert process.wait(timeout=60) == 0


def test_other_packages_are_set_beside_it_and_the_missing_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, peer in PEERS.items():
        if name in OTHERS:
            monkeypatch.setitem(sys.modules, peer.module, None)
    for name in ("tiny", "gpt"):
        monkeypatch.setitem(CASES, name, replace(CASES[name], shapes=((64,),) * 2, jobs=(STEP,), peers=(FUSED,)))
    argv = ["--peers", "--case", "tiny", "--case", "gpt", "--repeats", "1", "--out", str(tmp_path / "rows.json")]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [out.count(f"{name}: left out, not installed") for name in OTHERS] == [1] * len(OTHERS)
    monkeypatch.setattr(command.peers, "unavailable", lambda name: None)
    assert command._with_peers(CASES["tiny"], report.Results({})).peers == (FUSED, *OTHERS)
    assert command._with_peers(CASES["gpt2-1"], report.Results({})).peers == CASES["gpt2-1"].peers


def test_file_names() -> None:
    for date, device, name in (
        ("2026-11-23T15:14:49+00:00", "AMD EPYC", "2026-11-23_amd-epyc.json"),
        ("2026-01-02", "NVIDIA H200", "2026-01-02_nvidia-h200.json"),
        ("2026-01-02", "Intel(R) Xeon(R) @ 2.0GHz", "2026-01-02_intel-xeon-2-0ghz.json"),
    ):
        assert report.file_name(date, device) == name
