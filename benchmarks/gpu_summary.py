"""The results of `make gpu` in words: stages, tests, a step's parts, and what was aimed at beside it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import (
    CAPTURED,
    CLIP_STEP_SCHEDULE,
    COPY,
    FUSED,
    NEXUS_TRITON,
    NORM,
    PROLOGUE,
    STEP,
    TORCH_LOOP,
    UPDATE,
)

MAX_NAMES = 30  # of failed tests
KERNELS = (NORM, PROLOGUE, UPDATE)
UNCLIPPED = "no clipping"  # the device, with no kernel for the norm
FIELDS = {"host": "host", "replay": "replay", "replay: host": "replay_host"}

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

    def result(self, rows: list[Data]) -> Data:
        """What it came to; `met` is None where it was not measured."""
        wanted = (self.case, self.job, self.peer)
        value: Any = next((row for row in rows if (row["case"], row["job"], row["peer"]) == wanted), None)
        backend = value and value["backend"]
        for key in self.figure.split("."):
            value = value and value[key]
        bound = f"{'at least' if self.at_least else 'at most'} {self.bound:g}"
        met = None if value is None else (value >= self.bound if self.at_least else value <= self.bound)
        return {"what": self.what, "value": value, "bound": bound, "met": met, "backend": backend}


RATIO, LOOP, HOST, REPLAY = "ratio.median", "loop.ratio.median", "host.nexus.median", "replay_host.nexus.median"
COPIED = "1B {} parameters, share of the speed of a copy"
CLIPPED = "the same with clip and schedule, times as fast as torch fused"
GPT = "captured step of the demo's GPT, times as fast as torch's loop"
TARGETS = (
    Target(COPIED.format("float32"), "billion", STEP, COPY, RATIO, 0.95),
    Target(CLIPPED, "billion", CLIP_STEP_SCHEDULE, FUSED, RATIO, 1.25),
    Target(COPIED.format("bfloat16"), "billion-bf16", STEP, COPY, RATIO, 0.9),
    Target("1000 tensors of 1,000, µs of the device", "many", STEP, FUSED, "nexus_us", 50, at_least=False),
    Target("the same, µs of the host", "many", STEP, FUSED, HOST, 200, at_least=False),
    Target("the same replayed, µs of the host", "many", STEP, FUSED, REPLAY, 20, at_least=False),
    Target(GPT, "train-gpt", CAPTURED, TORCH_LOOP, LOOP, 3),
    Target("captured step of an MLP of 2 layers, the same", "train-mlp", CAPTURED, TORCH_LOOP, LOOP, 6),
)


def tests(junit: Path) -> Data | None:
    """How many tests there were, and which failed; None where pytest did not come to its end."""
    try:
        suites = list(ElementTree.parse(junit).getroot().iter("testsuite"))
    except (OSError, ElementTree.ParseError):
        return None
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": len(failed), "names": failed[:MAX_NAMES]}


def steps(results: Data) -> list[str]:
    """A table of what a step with clipping and schedule takes, of each case and backend, and of its parts."""
    cells: dict[tuple[str, str], Data] = defaultdict(dict)
    for row in results["kernels"]:
        cells[row["case"], row["backend"]].update({part: row["times"][part]["median"] for part in KERNELS})
    for row in results["rows"]:
        if row["peer"] not in (COPY, NEXUS_TRITON):
            continue
        side, backend = ("nexus", row["backend"]) if row["peer"] == COPY else ("peer", "triton")
        found = cells[row["case"], backend]
        if row["job"] == STEP:
            found[UNCLIPPED] = row[f"{side}_us"]
            continue
        found["device"] = row[f"{side}_us"]
        for column, field in FIELDS.items():
            if row[field] and row[field][side]:
                found[column] = row[field][side]["median"]
        if row["peer"] == COPY:
            found.update({COPY: row["peer_us"], "step/copy": row["ratio"]["median"]})
    columns = (*KERNELS, "device", UNCLIPPED, *FIELDS, COPY, "step/copy")
    lines = [_step_line("steps, in µs", "", columns)]
    for (case, backend), found in cells.items():
        lines.append(_step_line(f"  {case}", backend, [_figure(found.get(name)) for name in columns]))
    left_out = [one for one in results["left_out"] if one["job"] == "kernels"]
    return lines + ["  {case}, {peer}: {reason}".format(**one) for one in left_out]


def _step_line(case: str, backend: str, cells: Sequence[str]) -> str:
    return f"{case:<16}{backend:<8}{''.join(f'{cell:>14}' for cell in cells)}"


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def text(results: Data) -> str:
    """For a terminal."""
    lines = ["{gpu}, commit {commit}, {date}".format(**results["metadata"]), ""]
    for stage in results["stages"]:
        lines.append("{name:<14} {status:<10} {seconds:>6.1f} s  {reason}".format(**stage).rstrip())
    counts = results["tests"]
    if counts is not None:
        lines += ["", "{tests} tests, {failed} failed, {skipped} skipped".format(**counts)]
        lines += [f"  failed: {name}" for name in counts["names"]]
    if results["rates"]:
        lines += ["", "rates that differ from the oracle in float32"]
        for name, found in results["rates"].items():
            count = "{unequal} of {steps}" if "unequal" in found else "not run: {not run}"
            lines.append(f"  {name:<12} {count.format(**found)}")
    lines += ["", *steps(results), "", "targets"]
    for target in results["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
        met = {None: "", True: "met", False: "MISSED"}[target["met"]]
        ran = f"{met} ({target['backend']})" if met else ""
        lines.append(f"  {target['what']:<64} {value:>12}  {target['bound']:<13} {ran}".rstrip())
    return "\n".join(lines)
