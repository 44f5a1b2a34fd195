"""`make gpu`: all that needs a GPU, in one go of under ten minutes and without a network.

It builds the extension for this machine's GPU, makes first steps with it, runs the tests that are marked gpu,
compute-sanitizer, every evaluator of schedules, and the benchmark. What one of them ends in does not touch the
others. The results go to
benchmarks/results/<date>_<gpu>.json, .png and -training.png; these, the logs and the summary also to the folder that
the environment's OUT names.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks import gpu_summary
from benchmarks.gpu_stages import Outcome, Stage, read, run, run_all
from benchmarks.report import FORMAT, ROOT, commit, file_name, now, write_json

WORK = ROOT / "build" / "gpu"  # logs, and what stages write
RESULTS = ROOT / "benchmarks" / "results"

LIMIT_S = 590.0
SANITIZER_EXIT = 86
LAST_LINES = 25  # of a failed stage's log, for the terminal
MAX_LOG = 2_000_000  # characters of a stage's log that are copied to OUT

GPU_TESTS = r"\bgpu\b|\bbackends?: |where_triton_runs|same_on_every_backend"  # the mark, and what has it
MAX_WORKERS = 8  # that share a GPU

# Not by setuptools, of which an older one refuses pyproject.toml.
BUILD = """
import sysconfig
from pathlib import Path
import setup
setup.compile_native(Path("nexus/_native" + sysconfig.get_config_var("EXT_SUFFIX")))
"""

PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def main() -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    stage = environment_stage()
    first = run(stage, stage.seconds, WORK / "environment.log", ROOT)
    if first.failed:
        print(f"make gpu cannot run here: {_last_lines('environment') or first.reason}", file=sys.stderr)
        print("Nothing was built, tested or written.", file=sys.stderr)
        return 2
    environment = _json("environment")
    metadata = {"device": "cuda", "date": now(), "commit": commit(), **environment}
    outcomes: list[Outcome] = []
    later = run_all(later_stages(environment["arch"]), LIMIT_S - first.seconds, WORK, ROOT)
    for outcome in itertools.chain([first], later):
        outcomes.append(outcome)
        print(f"{outcome.name}: {outcome.status}, {outcome.seconds:.1f} s. {outcome.reason}".rstrip(), flush=True)
        if outcome.failed:
            print(_last_lines(outcome.name), flush=True)
        summary = write(metadata, outcomes)
    print(f"\n{summary}")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def environment_stage() -> Stage:
    """Versions and the GPU. Without one, the others do not begin."""
    return Stage("environment", 90, check("environment", "environment"))  # torch, from a cold disk


def later_stages(arch: str) -> list[Stage]:
    """The extension's build for this GPU, and what it is built for."""
    build = [sys.executable, "-c", BUILD]
    native = {"NEXUS_REQUIRE_NATIVE": "1", "NEXUS_CUDA_ARCHS": arch}
    pytest = [sys.executable, "-m", "pytest", *files_with_gpu_tests(), "-m", "gpu", "-v"]
    pytest += ["--continue-on-collection-errors", f"--junitxml={WORK / 'junit.xml'}"]
    if importlib.util.find_spec("xdist"):
        workers = max(1, min(MAX_WORKERS, (os.cpu_count() or 1) - 2))
        # Not by group: that distribution waits for ever where a worker has crashed.
        pytest += ["-p", "xdist", "-n", str(workers), "--dist", "worksteal", "-p", "benchmarks.gpu_plugin"]
    bench = [sys.executable, "-m", "benchmarks", "--device", "cuda", "--out"]
    return [
        Stage("build", 90, build, {**native, "NEXUS_CUDA": "1"}),
        # Triton needs the rest of the extension.
        Stage("build-no-cuda", 25, build, {**native, "NEXUS_CUDA": "0"}, instead_of="build"),
        Stage(
            "smoke", 45, [sys.executable, "-m", "benchmarks.gpu_smoke", str(WORK / "smoke.json")], PATHS, shown=True
        ),
        # Whatever plugins that Python has, no test here needs them.
        Stage("tests", 110, pytest, {**PATHS, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        Stage("rates", 25, check("rates", "rates"), PATHS),
        # What torch asks of the driver may be refused without harm, and nexus reports its own failures.
        _sanitizer_stage("memcheck", "--report-api-errors", "no"),
        _sanitizer_stage("racecheck"),
        Stage("kernels", 30, [*bench, str(WORK / "kernels.json"), "--case", "kernels"], PATHS),
        Stage(
            "benchmark", 125, [*bench, str(WORK / "benchmark.json"), "--picture", str(WORK / "benchmark.png")], PATHS
        ),
    ]


def files_with_gpu_tests() -> list[str]:
    """Others are not even collected: what they import may be missing."""
    files = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if re.search(GPU_TESTS, file.read_text(encoding="utf-8"))]


def check(name: str, subject: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_checks", subject, str(WORK / f"{name}.json")]


def _sanitizer_stage(tool: str, *options: str) -> Stage:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [None, *(os.path.join(root, "bin") for root in roots if root)]
    found = next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)
    usual = ["--tool", tool, "--error-exitcode", str(SANITIZER_EXIT), "--launch-timeout", "0"]
    return Stage(
        tool,
        25,
        [found or "compute-sanitizer", *usual, *options, *check(tool, "small-case")],
        # Each tensor in memory of its own: what is beyond its end is out of bounds.
        {**PATHS, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        impossible=None if found else "compute-sanitizer is neither in CUDA_HOME/bin nor on PATH",
        excuse="Device not supported",
    )


def write(metadata: dict[str, Any], outcomes: list[Outcome]) -> str:
    """Write the results as far as they have come; returns the summary."""
    nothing = {"format": FORMAT, "rows": [], "kernels": [], "left_out": [], "complete": False}
    benchmark, kernels = (_json(name) or nothing for name in ("benchmark", "kernels"))
    results = {
        **benchmark,
        "metadata": {**metadata, **benchmark.get("metadata", {})},
        "kernels": kernels["kernels"],
        "left_out": [*benchmark["left_out"], *kernels["left_out"]],
        "stages": [vars(outcome) for outcome in outcomes],
        "tests": gpu_summary.tests(WORK / "junit.xml"),
        "rates": _json("rates"),
        "smoke": _json("smoke"),
        "targets": [target.result(benchmark["rows"]) for target in gpu_summary.TARGETS],
    }
    summary = gpu_summary.text(results)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / file_name(metadata["date"], metadata["gpu"])
    write_json(path, results)
    files = [path, *WORK.glob("junit.xml")]
    for picture in WORK.glob("benchmark*.png"):
        files.append(path.with_name(picture.name.replace("benchmark", path.stem)))
        shutil.copy(picture, files[-1])
    if os.environ.get("OUT"):
        _copy_out(Path(os.environ["OUT"]), files, summary, outcomes)
    return summary


def _copy_out(out: Path, files: list[Path], summary: str, outcomes: list[Outcome]) -> None:
    """Few files, since a machine that is lent may send back only a few."""
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copy(path, out)
    logs = [f"===== {one.name}: {one.status}\n{read(WORK / f'{one.name}.log')[-MAX_LOG:]}" for one in outcomes]
    (out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
    (out / "logs.txt").write_text("\n".join(logs), encoding="utf-8")


def _last_lines(name: str) -> str:
    return "\n".join(read(WORK / f"{name}.log").rstrip().splitlines()[-LAST_LINES:])


def _json(name: str) -> Any:
    path = WORK / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
