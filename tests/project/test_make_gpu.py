"""`make gpu` without a GPU: its stages are fakes here, and its checks run on the CPU."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_smoke, gpu_stages, gpu_summary
from benchmarks.cases import CASES, CUDA, TRAINING_CASES
from benchmarks.gpu_stages import Outcome, Stage, run
from nexus.backends import reference
from nexus.backends.native import NativeRunner

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **options) -> Stage:
    return Stage("fake", 9, [sys.executable, "-c", code], **options)


@pytest.mark.parametrize(
    ("stage", "status", "reason"),
    [
        (python("print('fine')"), "passed", ""),
        (python("print('oh'); raise SystemExit(3)"), "failed", "exit code 3"),
        (python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"), "failed", "killed by SIGSEGV"),
        (python("exit('no such device')", excuse="no such device"), "not run", "no such device"),
        (python("", impossible="no such tool"), "not run", "no such tool"),
        (
            Stage("fake", 9, ["./no-such-program"]),
            "failed",
            "./no-such-program cannot be run: ",
        ),
    ],
    ids=["passed", "failed", "killed", "excused", "impossible", "no program"],
)
def test_outcomes(stage: Stage, status: str, reason: str, tmp_path: Path) -> None:
    outcome = run(stage, 60, tmp_path / "log", tmp_path)
    assert (outcome.status, outcome.failed) == (status, status == "failed")
    assert outcome.reason.startswith(reason)
    assert bool(reason) == bool(outcome.reason)
    assert "print" not in stage.command[-1] or (tmp_path / "log").read_text().strip()


def test_a_stage_that_does_not_end_is_ended_with_its_children(tmp_path: Path, monkeypatch) -> None:
    """Also those that ignore being asked to."""
    child = (
        "import signal, time; [signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)]; "
        "print('up', flush=True); time.sleep(60)"
    )
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    monkeypatch.setattr(gpu_stages, "PATIENCE_S", 0.5)
    started = time.monotonic()
    outcome = run(python(code), 2, tmp_path / "log", tmp_path)
    assert time.monotonic() - started < 20
    assert (outcome.status, outcome.failed) == ("timed out", True)
    assert "ended after 2 s" in outcome.reason
    pid, up = (tmp_path / "log").read_text().split()[:2]
    assert up == "up"
    time.sleep(0.2)
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_stage_that_is_ended_may_write_what_it_knows(tmp_path: Path) -> None:
    """As pytest does at an interrupt."""
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('report')"
    assert run(python(code), 1.5, tmp_path / "log", tmp_path).status == "timed out"
    assert (tmp_path / "log").read_text() == "report\n"


@pytest.mark.parametrize(
    ("names", "test_seconds", "limit_s", "status"),
    [("fine imports crashes breaks hangs", 3, 60, "failed"), ("fine imports hangs", 60, 25, "timed out")],
    ids=["each test's limit", "the stage's limit"],
)
def test_a_test_that_hangs_crashes_breaks_cuda_or_cannot_be_imported_costs_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, test_seconds: int, limit_s: int, status: str
) -> None:
    """Only SIGKILL ends the hang, as one in a kernel."""
    deaf = "[signal.signal(each, signal.SIG_IGN) for each in (signal.SIGINT, signal.SIGTERM)]"
    bodies = {
        "fine": "pass",
        "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
        "breaks": "import torch\n    torch.cuda.is_initialized = lambda: True\n"
        "    torch.cuda.synchronize = illegal_access",
        "hangs": f"{deaf}\n    print('no end')\n    time.sleep(60)",
    }
    for name, body in bodies.items():
        code = "import os, pytest, signal, time\ndef illegal_access(): raise RuntimeError('CUDA error')\n"
        code += f"@pytest.mark.gpu\ndef test_it():\n    {body}\n"
        (tmp_path / f"test_{name}.py").write_text(code)
    (tmp_path / "test_imports.py").write_text("import no_such_module\n")
    files = [str(tmp_path / f"test_{name}.py") for name in names.split()]
    monkeypatch.setattr(gpu, "files_with_gpu_tests", lambda: files)
    monkeypatch.setattr(gpu, "WORK", tmp_path)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(gpu_stages, "PATIENCE_S", 4.0)
    (stage,) = (stage for stage in gpu.later_stages("sm_90") if stage.name == "tests")
    stage = replace(stage, environment={**stage.environment, "NEXUS_TEST_SECONDS": str(test_seconds)})
    outcome = run(stage, limit_s, tmp_path / "log", tmp_path)
    assert outcome.status == status
    lost = {"::test_imports"}
    logged = ["No module named 'no_such_module'"]
    if status == "failed":
        lost |= {f"test_{name}::test_it" for name in ("crashes", "breaks", "hangs")}
        logged += ["test_breaks.py::test_it leaves this process without CUDA: CUDA error", "Timeout (0:00:03)!"]
    assert set(gpu_summary.tests(tmp_path / "junit.xml")["names"]) == lost
    assert 'classname="test_fine"' in (tmp_path / "junit.xml").read_text()
    for words in logged:
        assert words in (tmp_path / "log").read_text()


def test_what_a_stage_prints_is_shown_as_it_goes(tmp_path: Path, capsys) -> None:
    code = "import time; print('one', flush=True); time.sleep(1); print('two'); raise SystemExit(1)"
    printed = []
    wait = subprocess.Popen.wait

    def watched(self, timeout=None):
        printed.append(capsys.readouterr().out)
        return wait(self, timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "wait", watched)
        assert run(python(code, shown=True), 60, tmp_path / "log", tmp_path).reason == "exit code 1"
    assert "one" in "".join(printed)
    assert "two" in capsys.readouterr().out
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    assert (
        run(python("import time; time.sleep(60)", shown=True), 0.5, tmp_path / "log", tmp_path).status == "timed out"
    )


def test_time_that_is_left_goes_to_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, limits, taken = 1000.0, [], iter((10, 50, 60, 0))

    def fake(stage: Stage, limit_s: float, log: Path, folder: Path) -> Outcome:
        nonlocal now
        limits.append(limit_s)
        now += next(taken)
        return Outcome(stage.name, "passed")

    monkeypatch.setattr(gpu_stages, "run", fake)
    monkeypatch.setattr(gpu_stages.time, "monotonic", lambda: now)
    stages = [Stage(name, seconds, []) for name, seconds in (("a", 30), ("b", 20), ("c", 30), ("d", 10))]
    assert len(list(gpu_stages.run_all(stages, 100, tmp_path, tmp_path))) == 4
    assert limits == [40, 50, 30, 0]


def test_the_stages_fit_into_the_time() -> None:
    stages = [gpu.environment_stage(), *gpu.later_stages("sm_90")]
    assert sum(stage.seconds for stage in stages) <= gpu.LIMIT_S <= 590
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
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`main` over fake stages: `codes` says what each of them runs."""
    work, results, out = tmp_path / "work", tmp_path / "results", tmp_path / "out"
    monkeypatch.setattr(gpu, "WORK", work)
    monkeypatch.setattr(gpu, "RESULTS", results)
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(gpu_stages, "PATIENCE_S", 0.5)

    def writes(name: str, content: str) -> str:
        return f"from pathlib import Path; Path({str(work / name)!r}).write_text({content!r})\n"

    found = {"gpu": "NVIDIA Fake 1", "arch": "sm_90", "torch": "2.11"}
    rates = {"cuda": {"steps": 10, "unequal": 0}, "triton": {"not run": "no Triton"}}
    benchmark = {"format": 2, "metadata": {"torch": "2.11.0"}, "rows": [ROW], "left_out": []}
    codes = {
        "environment": writes("environment.json", json.dumps(found)),
        "rates": writes("rates.json", json.dumps(rates)),
        "benchmark": writes("benchmark.json", json.dumps(benchmark)) + writes("benchmark-training.png", "drawn"),
    }
    made = SimpleNamespace(codes=codes, writes=writes, results=results, out=out, seconds=None)

    def fake(stage: Stage) -> Stage:
        seconds = made.seconds or stage.seconds
        return replace(
            python(codes.get(stage.name, "")), name=stage.name, seconds=seconds, instead_of=stage.instead_of
        )

    environment, later = gpu.environment_stage, gpu.later_stages
    monkeypatch.setattr(gpu, "environment_stage", lambda: fake(environment()))
    monkeypatch.setattr(gpu, "later_stages", lambda arch: [fake(stage) for stage in later(arch)])
    return made


def result(whole) -> dict:
    (path,) = whole.results.glob("*.json")
    assert path.name.endswith("_nvidia-fake-1.json")
    return json.loads(path.read_text())


def test_all_pass(whole, capsys) -> None:
    assert gpu.main() == 0
    data = result(whole)
    names = ["environment", "build", "smoke", "tests", "rates", "memcheck", "racecheck", "kernels", "benchmark"]
    assert [(stage["name"], stage["status"]) for stage in data["stages"]] == [(name, "passed") for name in names]
    assert {"gpu", "date", "commit", "torch"} <= set(data["metadata"])
    assert data["metadata"]["torch"] == "2.11.0"
    assert data["rows"] == [ROW]
    assert {target["met"] for target in data["targets"]} == {True, False, None}
    out = capsys.readouterr().out
    for words in (gpu_summary.TARGETS[3].what, "MISSED (triton)", "not measured", "0 of 10", "no Triton"):
        assert words in out
    files = {path.name for path in whole.results.iterdir()}
    assert {path.name for path in whole.out.iterdir()} == {"summary.txt", "logs.txt", *files}
    assert [path.name[10:] for path in whole.results.glob("*.png")] == ["_nvidia-fake-1-training.png"]
    assert (whole.out / "summary.txt").read_text().strip() in out


def test_a_failure_and_a_timeout_leave_the_others_alone(whole, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    test = '<testcase classname="tests.a" name="b"><failure/></testcase>'
    junit = f'<testsuites><testsuite tests="3" skipped="1">{test}</testsuite></testsuites>'
    whole.codes["build"] = "print('nvcc fatal'); raise SystemExit(1)"
    whole.codes["tests"] = "import time; time.sleep(60)"
    whole.codes["memcheck"] = whole.writes("junit.xml", junit)
    # What came before the last stage is on disk when it runs.
    whole.codes["racecheck"] = f"from pathlib import Path; assert list(Path({str(whole.results)!r}).glob('*.json'))"
    whole.seconds = 1.0
    monkeypatch.setattr(gpu, "LIMIT_S", 9.0)
    assert gpu.main() == 1
    data = result(whole)
    statuses = {stage["name"]: stage["status"] for stage in data["stages"]}
    assert (statuses.pop("build"), statuses.pop("tests")) == ("failed", "timed out")
    assert statuses.pop("build-no-cuda") == "passed"  # so that Triton is tested all the same
    assert set(statuses.values()) == {"passed"}
    assert data["rows"] == [ROW]
    assert data["tests"] == {"tests": 3, "skipped": 1, "failed": 1, "names": ["tests.a::b"]}
    out = capsys.readouterr().out
    assert "nvcc fatal" in out
    assert "failed: tests.a::b" in out
    assert "nvcc fatal" in (whole.out / "logs.txt").read_text()


def test_stages_that_hang_crash_or_cannot_import(whole, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each is named with its end, and what it said is kept; those after it run."""
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('half way'); time.sleep(60)"
    whole.codes["smoke"] = "import os, signal; print('a step'); os.kill(os.getpid(), signal.SIGSEGV)"
    whole.codes["rates"] = deaf
    whole.codes["kernels"] = "import no_such_module"
    whole.seconds = 1.0
    monkeypatch.setattr(gpu, "LIMIT_S", 10.0)
    monkeypatch.setattr(gpu_stages, "PATIENCE_S", 0.1)
    assert gpu.main() == 1
    stages = {stage["name"]: (stage["status"], stage["reason"]) for stage in result(whole)["stages"]}
    status, reason = stages.pop("rates")
    assert (status, reason.startswith("it was ended after ")) == ("timed out", True)
    assert stages.pop("smoke") == ("failed", "killed by SIGSEGV")
    assert stages.pop("kernels") == ("failed", "exit code 1")
    assert set(stages.values()) == {("passed", "")}
    assert list(stages)[-1] == "benchmark"
    printed = capsys.readouterr().out
    for text in (printed, (whole.out / "logs.txt").read_text()):
        for words in ("a step", "half way", "ModuleNotFoundError: No module named 'no_such_module'"):
            assert words in text
    for words in ("smoke          failed", "killed by SIGSEGV", "rates          timed out", "kernels        failed"):
        assert words in (whole.out / "summary.txt").read_text()


def test_no_benchmark(whole) -> None:
    whole.codes["benchmark"] = "raise SystemExit(1)"
    assert gpu.main() == 1
    data = result(whole)
    assert (data["rows"], data["complete"]) == ([], False)
    assert data["rates"]["cuda"]["unequal"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    results = sorted(gpu.RESULTS.iterdir())
    command = ["make", "--no-print-directory", "gpu", f"GPU_PYTHON={sys.executable}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode != 0
    assert "make gpu cannot run here: this machine has no GPU that torch" in found.stderr
    assert sorted(gpu.RESULTS.iterdir()) == results


def test_without_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    command = gpu.check("found", "environment")
    found = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert found.returncode == 1
    assert "GPU_PYTHON" in found.stderr
    assert found.stderr.count("\n") == 1


def test_rates_that_differ_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("native", "torch", "reference")
    assert gpu_checks.rates(2000, names) == {name: {"steps": 14_000, "unequal": 0} for name in names}
    right = reference.evaluate
    monkeypatch.setattr(reference, "evaluate", lambda table, steps: right(table, steps) * (1 + 1e-6))
    found = gpu_checks.rates(1000, names)
    assert found["reference"]["unequal"] > 6000
    assert gpu_checks.unequal(found) == ["cuda", "triton", "reference"]  # those that have not run, too


def test_the_small_case_finds_a_kernel_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(gpu_checks.small_case("cpu", ("native",))) == 4
    with pytest.raises(SystemExit, match="nothing to check"):
        gpu_checks.small_case("cpu", ("tpu",))
    monkeypatch.setattr(NativeRunner, "_run", lambda *arguments: None)
    with pytest.raises(SystemExit, match=r"native, float32, no options: .* from the reference, more than 1e-06"):
        gpu_checks.small_case("cpu", ("native",))


def test_the_smoke_stage_says_what_became_of_each_part(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found = gpu_smoke.smoke("cpu", ("native", "tpu"))
    steps = [f"a step, {stored}" for stored, *_ in gpu_smoke.STEPS]
    parts = [*steps, "captured attention", "after a broken capture"]
    assert found == {"tpu": "not available", **{f"native: {part}": "" for part in parts}}
    assert capsys.readouterr().out.count("passed") == len(parts)
    monkeypatch.setattr(NativeRunner, "_run", lambda *arguments: None)
    found = gpu_smoke.smoke("cpu", ("native",))
    assert [part for part in parts if "from the reference" in found[f"native: {part}"]] == steps


def test_only_files_with_gpu_tests_are_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, "tests/optim", "tests/parity"], cwd=ROOT, capture_output=True, text=True)
    files = {line.partition("::")[0] for line in run.stdout.splitlines() if "::" in line}
    assert len(files) > 20
    assert files <= set(gpu.files_with_gpu_tests())
    assert "tests/optim/test_torch_cases.py" in files  # which needs expecttest


@pytest.mark.parametrize("target", gpu_summary.TARGETS, ids=lambda target: target.what)
def test_a_target_names_a_row_that_the_benchmark_has(target: gpu_summary.Target) -> None:
    case = {**CASES, **TRAINING_CASES}[target.case]
    assert CUDA in case.by_default
    assert (target.job, target.peer) in case.comparisons(CUDA)


@pytest.mark.parametrize(("case", "bound"), [("train-gpt", 3), ("train-mlp", 6)])
def test_targets_of_training(case: str, bound: float) -> None:
    (target,) = (target for target in gpu_summary.TARGETS if target.case == case)
    for ratio, met in ((bound + 0.1, True), (bound - 0.1, False)):
        row = {"case": case, "job": "training step, captured", "peer": "torch loop", "backend": "cuda"}
        row["loop"] = {"nexus": {"median": 1.0}, "peer": {"median": ratio}, "ratio": {"median": ratio}}
        other = {**row, "peer": "torch in a CUDA graph", "loop": None}
        found = target.result([other, row])
        assert (found["value"], found["bound"], found["met"]) == (ratio, f"at least {bound}", met)
        assert target.result([other])["met"] is None
