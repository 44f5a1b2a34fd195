"""`make gpu`: all that needs a GPU, in one go of under ten minutes and without a network.

It builds the extension for this machine's GPU, runs the tests that are marked gpu, compute-sanitizer, every
evaluator of schedules, and the benchmark. What one of them ends in does not touch the others. The results go to
benchmarks/results/<date>_<gpu>.json, .png and -training.png; these, the logs and the summary also to the folder that
the environment's OUT names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gpu_summary  # noqa: E402
from gpu_stages import Outcome, Stage, Timetable, read, run  # noqa: E402

from benchmarks.report import commit, file_name, now, write_json  # noqa: E402

WORK = ROOT / "build" / "gpu"  # logs, and what stages write
RESULTS = ROOT / "benchmarks" / "results"

LIMIT_S = 590.0
BUDGETS = {  # seconds that each stage is sure of; what one leaves goes to the next
    "environment": 40.0,
    "build": 100.0,
    "build-no-cuda": 30.0,
    "tests": 135.0,
    "rates": 35.0,
    "memcheck": 35.0,
    "racecheck": 35.0,
    "benchmark": 175.0,
}
SANITIZER_EXIT = 86
LAST_LINES = 25  # of a failed stage's log, for the terminal
MAX_LOG = 2_000_000  # characters of a stage's log that are copied to OUT

PATHS = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def check(name: str, subject: str) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / "gpu_checks.py"), subject, str(WORK / f"{name}.json")]


def environment_stage() -> Stage:
    return Stage("environment", BUDGETS["environment"], check("environment", "environment"))


def build_stages(arch: str) -> tuple[Stage, Stage]:
    """With CUDA, and what is built where that fails: Triton needs the rest of the extension."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    native = {"NEXUS_REQUIRE_NATIVE": "1", "NEXUS_CUDA_ARCHS": arch}
    return (
        Stage("build", BUDGETS["build"], command, {**native, "NEXUS_CUDA": "1"}),
        Stage("build-no-cuda", BUDGETS["build-no-cuda"], command, {**native, "NEXUS_CUDA": "0"}),
    )


def later_stages() -> list[Stage]:
    """What the extension is built for."""
    pytest = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", f"--junitxml={WORK / 'junit.xml'}"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-p", "xdist", "-n", "4", "--dist", "loadgroup"]
    bench = [sys.executable, "-m", "benchmarks", "--device", "cuda"]
    bench += ["--out", str(WORK / "benchmark.json"), "--picture", str(WORK / "benchmark.png")]
    return [
        # Whatever plugins that Python has, no test here needs them.
        Stage("tests", BUDGETS["tests"], pytest, {**PATHS, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        Stage("rates", BUDGETS["rates"], check("rates", "rates"), PATHS),
        *(_sanitizer_stage(tool) for tool in ("memcheck", "racecheck")),
        Stage("benchmark", BUDGETS["benchmark"], bench, PATHS),
    ]


def _sanitizer_stage(tool: str) -> Stage:
    sanitizer = find_sanitizer()
    options = ["--tool", tool, "--error-exitcode", str(SANITIZER_EXIT), "--launch-timeout", "0"]
    # What torch asks of the driver may be refused without harm, and nexus reports its own failures.
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return Stage(
        tool,
        BUDGETS[tool],
        [sanitizer or "compute-sanitizer", *options, *check(tool, "small-case")],
        # Each tensor in memory of its own: what is beyond its end is out of bounds.
        {**PATHS, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        impossible=None if sanitizer else "compute-sanitizer is neither in CUDA_HOME/bin nor on PATH",
        excuse="Device not supported",
    )


def find_sanitizer() -> str | None:
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [None, *(os.path.join(root, "bin") for root in roots if root)]
    return next(filter(None, (shutil.which("compute-sanitizer", path=place) for place in places)), None)


class Report:
    """The results as far as they have come, on disk after every stage."""

    def __init__(self, environment: dict[str, Any], results: Path, out: Path | None) -> None:
        date = now()
        self._metadata = {"device": "cuda", "date": date, "commit": commit(), **environment}
        self._path = results / file_name(date, environment["gpu"])
        self._out = out
        self.outcomes: list[Outcome] = []

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        line = f"{outcome.name}: {outcome.status}, {outcome.seconds:.1f} s. {outcome.reason}".rstrip()
        tail = read(_log(outcome.name), LAST_LINES) if outcome.failed else ""
        print(line, *([tail] if tail else []), sep="\n", flush=True)
        self.write()

    def write(self) -> str:
        """Write everything; returns the summary."""
        benchmark = _json("benchmark") or {"format": 2, "rows": [], "left_out": [], "complete": False}
        results = {
            **benchmark,
            "metadata": {**self._metadata, **benchmark.get("metadata", {})},
            "stages": [vars(outcome) for outcome in self.outcomes],
            "tests": gpu_summary.tests(WORK / "junit.xml"),
            "rates": _json("rates"),
            "targets": gpu_summary.targets(benchmark["rows"]),
        }
        summary = gpu_summary.text(results)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, results)
        for picture, place in self._pictures():
            if picture.exists():
                shutil.copy(picture, place)
        if self._out is not None:
            self._copy_out(summary)
        return summary

    def _pictures(self) -> list[tuple[Path, Path]]:
        """What the benchmark may have drawn, and where it goes."""
        drawn = [WORK / "benchmark.png", WORK / "benchmark-training.png"]
        return [(path, self._path.with_name(path.name.replace("benchmark", self._path.stem))) for path in drawn]

    def _copy_out(self, summary: str) -> None:
        """Few files, since a machine that is lent may send back only a few."""
        assert self._out is not None
        self._out.mkdir(parents=True, exist_ok=True)
        for path in (self._path, *(place for _, place in self._pictures()), WORK / "junit.xml"):
            if path.exists():
                shutil.copy(path, self._out)
        logs = [
            f"===== {outcome.name}: {outcome.status}\n{read(_log(outcome.name))[-MAX_LOG:]}"
            for outcome in self.outcomes
        ]
        (self._out / "summary.txt").write_text(summary + "\n", encoding="utf-8")
        (self._out / "logs.txt").write_text("\n".join(logs), encoding="utf-8")


def _log(name: str) -> Path:
    return WORK / f"{name}.log"


def _json(name: str) -> Any:
    path = WORK / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def main() -> int:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    timetable = Timetable(LIMIT_S, BUDGETS)

    def outcome_of(stage: Stage) -> Outcome:
        return run(stage, timetable.limit_of(stage.name), _log(stage.name), ROOT)

    first = outcome_of(environment_stage())
    if first.failed:
        words = read(_log("environment"), LAST_LINES) or first.reason
        print(f"make gpu cannot run here: {words}\nNothing was built, tested or written.", file=sys.stderr)
        return 2
    environment = _json("environment")
    out = os.environ.get("OUT")
    report = Report(environment, RESULTS, Path(out) if out else None)
    report.add(first)
    with_cuda, without_cuda = build_stages(environment["arch"])
    report.add(outcome_of(with_cuda))
    if report.outcomes[-1].failed:
        report.add(outcome_of(without_cuda))
    for stage in later_stages():
        report.add(outcome_of(stage))
    print(f"\n{report.write()}")
    return 1 if any(outcome.failed for outcome in report.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
