"""The results of `make gpu` in words: each stage, the tests, and what was aimed at beside what was reached."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NAMES = 30  # of failed tests

Data = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure of a row that is aimed at: at least, or at most, `bound`."""

    what: str
    case: str
    job: str
    peer: str
    figure: str  # its field, or a path to it
    bound: float
    at_least: bool = True

    def of(self, row: Data) -> float | None:
        """The figure of this row; None where it was not measured."""
        value: Any = row
        for key in self.figure.split("."):
            value = value and value[key]
        return value


CLIPPED, CAPTURED = "clip + step + schedule", "training step, captured"
RATIO, LOOP, HOST, REPLAY = "ratio.median", "loop.ratio.median", "host.nexus.median", "replay_host.nexus.median"
COPIED = "1B {} parameters, share of the speed of a copy"
TARGETS = (
    Target(COPIED.format("float32"), "billion", "step", "copy", RATIO, 0.95),
    Target("the same with clip and schedule, times as fast as torch fused", "billion", CLIPPED, "fused", RATIO, 1.25),
    Target(COPIED.format("bfloat16"), "billion-bf16", "step", "copy", RATIO, 0.9),
    Target("1000 tensors of 1,000, µs of the device", "many", "step", "fused", "nexus_us", 50, at_least=False),
    Target("the same, µs of the host", "many", "step", "fused", HOST, 200, at_least=False),
    Target("the same replayed, µs of the host", "many", "step", "fused", REPLAY, 20, at_least=False),
    Target(
        "captured step of the demo's GPT, times as fast as torch's loop", "train-gpt", CAPTURED, "torch loop", LOOP, 3
    ),
    Target("captured step of an MLP of 2 layers, the same", "train-mlp", CAPTURED, "torch loop", LOOP, 6),
)


def targets(rows: list[Data]) -> list[Data]:
    """What each target came to; `met` is None where it was not measured."""
    found = []
    for target in TARGETS:
        wanted = (target.case, target.job, target.peer)
        row = next((row for row in rows if (row["case"], row["job"], row["peer"]) == wanted), None)
        value = None if row is None else target.of(row)
        met = None if value is None else (value >= target.bound if target.at_least else value <= target.bound)
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        backend = None if row is None else row["backend"]
        found.append({"what": target.what, "value": value, "bound": bound, "met": met, "backend": backend})
    return found


def tests(junit: Path) -> Data | None:
    """How many tests there were, and which failed; None where pytest did not come to its end."""
    if not junit.exists():
        return None
    suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": len(failed), "names": failed[:MAX_NAMES]}


def text(results: Data) -> str:
    """For a terminal."""
    lines = [
        f"{results['metadata']['gpu']}, commit {results['metadata']['commit']}, {results['metadata']['date']}",
        "",
    ]
    for stage in results["stages"]:
        lines.append(
            f"{stage['name']:<14} {stage['status']:<10} {stage['seconds']:>6.1f} s  {stage['reason']}".rstrip()
        )
    counts = results["tests"]
    if counts is not None:
        lines += ["", f"{counts['tests']} tests, {counts['failed']} failed, {counts['skipped']} skipped"]
        lines += [f"  failed: {name}" for name in counts["names"]]
    if results["rates"]:
        lines += ["", "rates that differ from the oracle in float32"]
        for name, found in results["rates"].items():
            count = (
                f"{found['unequal']} of {found['steps']}" if "unequal" in found else f"not run: {found['not run']}"
            )
            lines.append(f"  {name:<12} {count}")
    lines += ["", "targets"]
    for target in results["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
        met = {None: "", True: "met", False: "MISSED"}[target["met"]]
        ran = f"{met} ({target['backend']})" if met else ""
        lines.append(f"  {target['what']:<64} {value:>12}  {target['bound']:<13} {ran}".rstrip())
    return "\n".join(lines)
