"""`make gpu` without a GPU: its stages are fakes here, and its checks run on the CPU."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def make_gpu():
    """The modules in benchmarks."""
    names = ("gpu", "gpu_stages", "gpu_checks", "gpu_summary")
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path[:] = before
        for name in names:
            sys.modules.pop(name, None)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


# One stage.


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("print('fine')", "passed", ""),
        ("print('oh'); raise SystemExit(3)", "failed", "exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "failed", "killed by signal 11"),
        ("import sys; sys.exit('Device not supported')", "not run", "Device not supported"),
    ],
)
def test_outcomes(make_gpu, tmp_path: Path, code: str, status: str, reason: str) -> None:
    stage = make_gpu.gpu_stages.Stage("fake", 9, python(code), excuse="Device not supported")
    outcome = make_gpu.gpu_stages.run(stage, 60, tmp_path / "log", tmp_path)
    assert (outcome.status, outcome.reason) == (status, reason)
    assert outcome.failed == (status == "failed")
    assert "print" not in code or (tmp_path / "log").read_text().strip()


def test_a_stage_that_does_not_end_is_ended_with_its_children(make_gpu, tmp_path: Path) -> None:
    """Also those that ignore being asked to."""
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    make_gpu.gpu_stages.PATIENCE_S = 0.5
    started = time.monotonic()
    outcome = make_gpu.gpu_stages.run(
        make_gpu.gpu_stages.Stage("fake", 9, python(code)), 2, tmp_path / "log", tmp_path
    )
    assert time.monotonic() - started < 20
    assert (outcome.status, outcome.failed) == ("timed out", True)
    assert "ended after 2 s" in outcome.reason
    pid, up = (tmp_path / "log").read_text().split()
    assert up == "up"
    time.sleep(0.2)
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_what_cannot_run_is_not_passed(make_gpu, tmp_path: Path) -> None:
    run, stage = make_gpu.gpu_stages.run, make_gpu.gpu_stages.Stage
    outcome = run(stage("fake", 9, python(""), impossible="no such tool"), 60, tmp_path / "log", tmp_path)
    assert (outcome.status, outcome.reason, outcome.failed) == ("not run", "no such tool", False)
    outcome = run(stage("fake", 9, ["./no-such-program"]), 60, tmp_path / "log", tmp_path)
    assert outcome.failed
    assert "cannot be run" in outcome.reason


def test_time_that_is_left_goes_to_the_next(make_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(make_gpu.gpu_stages.time, "monotonic", lambda: now)
    timetable = make_gpu.gpu_stages.Timetable(100, {"a": 30, "b": 20, "c": 40})
    assert timetable.limit_of("a") == 40
    now += 10
    assert timetable.limit_of("b") == 50
    now += 50
    assert timetable.limit_of("c") == 40
    now += 60
    assert timetable.limit_of("c") == 0
    with pytest.raises(ValueError, match="90 s together"):
        make_gpu.gpu_stages.Timetable(80, {"a": 30, "b": 20, "c": 40})


# The whole.


def test_budgets_are_those_of_the_stages(make_gpu) -> None:
    gpu = make_gpu.gpu
    stages = [gpu.environment_stage(), *gpu.build_stages("sm_90"), *gpu.later_stages()]
    assert [stage.name for stage in stages] == list(gpu.BUDGETS)
    assert sum(gpu.BUDGETS.values()) <= gpu.LIMIT_S <= 590
    assert stages[1].environment == {"NEXUS_REQUIRE_NATIVE": "1", "NEXUS_CUDA_ARCHS": "sm_90", "NEXUS_CUDA": "1"}


ROW = {
    "case": "many",
    "job": "step",
    "peer": "fused",
    "backend": "triton",
    "nexus_us": 40.0,
    "host": {"nexus": {"median": 250.0}, "peer": None},
    "replay_host": None,
}


@pytest.fixture
def whole(make_gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`main` over fake stages: `codes` says what each of them runs."""
    gpu, stage = make_gpu.gpu, make_gpu.gpu_stages.Stage
    work, results, out = tmp_path / "work", tmp_path / "results", tmp_path / "out"
    monkeypatch.setattr(gpu, "WORK", work)
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(make_gpu.gpu_stages, "PATIENCE_S", 0.5)

    def writes(name: str, content: object) -> str:
        return f"from pathlib import Path; Path({str(work / name)!r}).write_text({json.dumps(content)!r})"

    found = {"gpu": "NVIDIA Fake 1", "arch": "sm_90", "torch": "2.11"}
    codes = dict.fromkeys(gpu.BUDGETS, "") | {
        "environment": writes("environment.json", found),
        "rates": writes("rates.json", {"cuda": {"steps": 10, "unequal": 0}, "triton": {"not run": "no Triton"}}),
        "benchmark": writes("benchmark.json", {"format": 2, "metadata": {"torch": "2.11.0"}, "rows": [ROW]})
        + f"; Path({str(work / 'benchmark-training.png')!r}).write_text('drawn')",
    }

    def fake(real):
        def stages(*arguments):
            made = real(*arguments)
            many = [made] if isinstance(made, stage) else made
            fakes = [stage(one.name, one.seconds, python(codes[one.name])) for one in many]
            return fakes[0] if isinstance(made, stage) else fakes

        return stages

    for name in ("environment_stage", "build_stages", "later_stages"):
        monkeypatch.setattr(gpu, name, fake(getattr(gpu, name)))
    return SimpleNamespace(main=gpu.main, codes=codes, results=results, out=out, gpu=gpu)


def result(whole) -> dict:
    (path,) = whole.results.glob("*.json")
    assert path.name.endswith("_nvidia-fake-1.json")
    return json.loads(path.read_text())


def test_all_pass(whole, capsys) -> None:
    assert whole.main() == 0
    data = result(whole)
    names = ["environment", "build", "tests", "rates", "memcheck", "racecheck", "benchmark"]
    assert [(stage["name"], stage["status"]) for stage in data["stages"]] == [(name, "passed") for name in names]
    assert {"gpu", "date", "commit", "torch"} <= set(data["metadata"])
    assert data["metadata"]["torch"] == "2.11.0"
    assert data["rows"] == [ROW]
    assert {target["met"] for target in data["targets"]} == {True, False, None}
    out = capsys.readouterr().out
    for words in (
        "1000 tensors of 1,000, µs of the device",
        "MISSED (triton)",
        "not measured",
        "0 of 10",
        "no Triton",
    ):
        assert words in out
    assert {path.name for path in whole.out.iterdir()} == {
        "summary.txt",
        "logs.txt",
        *(p.name for p in whole.results.iterdir()),
    }
    assert [path.name[10:] for path in whole.results.glob("*.png")] == ["_nvidia-fake-1-training.png"]
    assert (whole.out / "summary.txt").read_text().strip() in out


def test_a_failure_and_a_timeout_leave_the_others_alone(whole, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    whole.codes["build"] = "print('nvcc fatal'); raise SystemExit(1)"
    whole.codes["tests"] = "import time; time.sleep(60)"
    test = '<testcase classname="tests.a" name="b"><failure/></testcase>'
    junit = f'<testsuites><testsuite tests="3" skipped="1">{test}</testsuite></testsuites>'
    whole.codes["memcheck"] = (
        f"from pathlib import Path; Path({str(whole.gpu.WORK / 'junit.xml')!r}).write_text({junit!r})"
    )
    monkeypatch.setattr(whole.gpu, "LIMIT_S", 8.0)
    monkeypatch.setattr(whole.gpu, "BUDGETS", dict.fromkeys(whole.gpu.BUDGETS, 1.0))
    assert whole.main() == 1
    data = result(whole)
    statuses = {stage["name"]: stage["status"] for stage in data["stages"]}
    assert statuses.pop("build") == "failed"
    assert statuses.pop("tests") == "timed out"
    assert statuses.pop("build-no-cuda") == "passed"  # so that Triton is tested all the same
    assert set(statuses.values()) == {"passed"}
    assert data["rows"] == [ROW]
    assert data["tests"] == {"tests": 3, "skipped": 1, "failed": 1, "names": ["tests.a::b"]}
    out = capsys.readouterr().out
    assert "nvcc fatal" in out
    assert "failed: tests.a::b" in out
    assert "nvcc fatal" in (whole.out / "logs.txt").read_text()


def test_no_benchmark(whole) -> None:
    whole.codes["benchmark"] = "raise SystemExit(1)"
    assert whole.main() == 1
    data = result(whole)
    assert (data["rows"], data["complete"]) == ([], False)
    assert data["rates"]["cuda"]["unequal"] == 0


def test_without_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    results = sorted((ROOT / "benchmarks" / "results").iterdir())
    run = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"GPU_PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert "make gpu cannot run here: this machine has no GPU that torch" in run.stderr
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == results


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    check = [sys.executable, str(ROOT / "benchmarks" / "gpu_checks.py"), "environment", str(tmp_path / "found.json")]
    run = subprocess.run(check, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 1
    assert "GPU_PYTHON" in run.stderr
    assert run.stderr.count("\n") == 1


# The checks.


def test_rates(make_gpu) -> None:
    found = make_gpu.gpu_checks.rates(2000, ("native", "reference"))
    assert found == {name: {"steps": 14_000, "unequal": 0} for name in ("native", "reference")}


def test_rates_that_differ_are_counted(make_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus.backends import reference

    right = reference.evaluate
    monkeypatch.setattr(reference, "evaluate", lambda table, steps: right(table, steps) * (1 + 1e-6))
    found = make_gpu.gpu_checks.rates(1000, ("native", "reference"))
    assert found["reference"]["unequal"] > 6000
    assert make_gpu.gpu_checks.unequal(found) == ["cuda", "triton", "reference"]  # those that have not run, too


def test_small_case(make_gpu) -> None:
    found = make_gpu.gpu_checks.small_case("cpu", ("native",))
    assert len(found) == 4
    with pytest.raises(SystemExit, match="nothing to check"):
        make_gpu.gpu_checks.small_case("cpu", ("tpu",))


def test_the_small_case_finds_a_kernel_that_does_nothing(make_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus.backends.native import NativeRunner

    monkeypatch.setattr(NativeRunner, "_run", lambda *arguments: None)
    with pytest.raises(SystemExit, match="native, float32, no options: more than 1e-06"):
        make_gpu.gpu_checks.small_case("cpu", ("native",))


# Targets.


def test_targets_name_rows_that_the_benchmark_has(make_gpu) -> None:
    from benchmarks.cases import CASES, CUDA, TRAINING_CASES

    cases = {**CASES, **TRAINING_CASES}
    for target in make_gpu.gpu_summary.TARGETS:
        case = cases[target.case]
        assert CUDA in case.by_default
        assert target.job in case.jobs_on(CUDA)
        assert target.peer in case.peers_on(CUDA, target.job)


@pytest.mark.parametrize(("case", "bound"), [("train-gpt", 3), ("train-mlp", 6)])
def test_targets_of_training(make_gpu, case: str, bound: float) -> None:
    for ratio, met in ((bound + 0.1, True), (bound - 0.1, False)):
        row = {"case": case, "job": "training step, captured", "peer": "torch loop", "backend": "cuda"}
        row["loop"] = {"nexus": {"median": 1.0}, "peer": {"median": ratio}, "ratio": {"median": ratio}}
        other = {**row, "peer": "torch in a CUDA graph", "loop": None}
        found = [target for target in make_gpu.gpu_summary.targets([other, row]) if target["met"] is not None]
        assert [(target["value"], target["bound"], target["met"]) for target in found] == [
            (ratio, f"at least {bound}", met)
        ]
