"""The results of `make gpu` in words: each stage, the tests, and what was aimed at beside what was reached."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_NAMES = 30  # of failed tests

Data = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A figure that is aimed at: at least, or at most, `bound`."""

    what: str
    case: str
    job: str
    figure: Callable[[Data], float | None]  # of the row beside the peer
    bound: float
    at_least: bool = False
    peer: str = "fused"


def _of(comparison: Data | None, field: str = "nexus") -> float | None:
    return comparison[field]["median"] if comparison and comparison[field] else None


TARGETS = (
    Target(
        "1B float32 parameters, share of the speed of a copy",
        "billion",
        "step",
        lambda row: row["ratio"]["median"],
        0.95,
        at_least=True,
        peer="copy",
    ),
    Target(
        "the same with clip and schedule, times as fast as torch fused",
        "billion",
        "clip + step + schedule",
        lambda row: row["ratio"]["median"],
        1.25,
        at_least=True,
    ),
    Target(
        "1B bfloat16 parameters, share of the speed of a copy",
        "billion-bf16",
        "step",
        lambda row: row["ratio"]["median"],
        0.9,
        at_least=True,
        peer="copy",
    ),
    Target("1000 tensors of 1,000, µs of the device", "many", "step", lambda row: row["nexus_us"], 50),
    Target("the same, µs of the host", "many", "step", lambda row: _of(row["host"]), 200),
    Target("the same replayed, µs of the host", "many", "step", lambda row: _of(row["replay_host"]), 20),
    Target(
        "captured step of the demo's GPT, times as fast as torch's loop",
        "train-gpt",
        "training step, captured",
        lambda row: _of(row["loop"], "ratio"),
        3,
        at_least=True,
        peer="torch loop",
    ),
    Target(
        "captured step of an MLP of 2 layers, the same",
        "train-mlp",
        "training step, captured",
        lambda row: _of(row["loop"], "ratio"),
        6,
        at_least=True,
        peer="torch loop",
    ),
)


def targets(rows: list[Data]) -> list[Data]:
    """What each target came to; `met` is None where it was not measured."""
    found = []
    for target in TARGETS:
        wanted = (target.case, target.job, target.peer)
        row = next((row for row in rows if (row["case"], row["job"], row["peer"]) == wanted), None)
        value = None if row is None else target.figure(row)
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
