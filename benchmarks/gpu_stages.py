"""Runs commands one after the other, each with a time limit and a log of its own, whatever becomes of the others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
PATIENCE_S = 3.0  # between asking a stage to end and ending it


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds that it may take however long the stages before it took."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    impossible: str | None = None  # why it cannot run here
    excuse: str | None = None  # where a log with these words ends in a failure, it could not run here either


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""

    @property
    def failed(self) -> bool:
        return self.status in (FAILED, TIMED_OUT)


class Timetable:
    """Deals out the time of a whole run: what a stage leaves, the next may use.

    Args:
        limit_s: for everything, from now on.
        budgets: seconds that each stage is sure of, by its name, in the order in which they run.
    """

    def __init__(self, limit_s: float, budgets: Mapping[str, float]) -> None:
        if sum(budgets.values()) > limit_s:
            raise ValueError(
                f"the stages' budgets are {sum(budgets.values()):g} s together, and the limit {limit_s:g}"
            )
        self._end = time.monotonic() + limit_s
        self._budgets = dict(budgets)

    def limit_of(self, name: str) -> float:
        """Seconds that the stage may take if it begins now; the budgets of those after it are kept for them."""
        names = list(self._budgets)
        later = sum(self._budgets[after] for after in names[names.index(name) + 1 :])
        return max(0.0, self._end - time.monotonic() - later)


def run(stage: Stage, limit_s: float, log: Path, folder: Path) -> Outcome:
    """Run one stage in `folder`, with what it prints in `log`. Ends it, and all that it has started, at its limit."""
    if stage.impossible is not None:
        log.write_text(f"not run: {stage.impossible}\n", encoding="utf-8")
        return Outcome(stage.name, NOT_RUN, reason=stage.impossible)
    started = time.monotonic()
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                stage.command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(stage.name, FAILED, reason=f"{stage.command[0]} cannot be run: {error}")
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            _end(process)
            return Outcome(stage.name, TIMED_OUT, time.monotonic() - started, f"it was ended after {limit_s:.0f} s")
        except BaseException:  # Ctrl-C goes to this process alone
            _end(process)
            raise
    seconds = time.monotonic() - started
    if code == 0:
        return Outcome(stage.name, PASSED, seconds)
    if stage.excuse is not None and stage.excuse in read(log):
        return Outcome(stage.name, NOT_RUN, seconds, stage.excuse)
    return Outcome(stage.name, FAILED, seconds, f"killed by signal {-code}" if code < 0 else f"exit code {code}")


def read(log: Path, last: int | None = None) -> str:
    """The text of a log, or its last lines; empty where there is none."""
    if not log.exists():
        return ""
    text = log.read_text(encoding="utf-8", errors="replace")
    return text if last is None else "\n".join(text.rstrip().splitlines()[-last:])


def _end(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, kind)
            process.wait(PATIENCE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
