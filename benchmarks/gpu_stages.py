"""Runs commands one after the other, each with a time limit and a log of its own, whatever becomes of the others."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"
PATIENCE_S = 3.0  # after each of the signals by which a stage is ended


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds that it may take however long the stages before it took."""

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    instead_of: str | None = None  # the stage without whose failure it is left out
    impossible: str | None = None  # why it cannot run here
    shown: bool = False  # whether what it prints is to be seen as it goes
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


def run_all(stages: Sequence[Stage], limit_s: float, logs: Path, folder: Path) -> Iterator[Outcome]:
    """Run stages in `limit_s` seconds. What one leaves of its time, the next may use; those after it keep theirs."""
    end = time.monotonic() + limit_s
    failed = set()
    for number, stage in enumerate(stages):
        if stage.instead_of is not None and stage.instead_of not in failed:
            continue
        later = sum(after.seconds for after in stages[number + 1 :])
        left = max(0.0, end - time.monotonic() - later)
        outcome = run(stage, left, logs / f"{stage.name}.log", folder)
        if outcome.failed:
            failed.add(stage.name)
        yield outcome


def run(stage: Stage, limit_s: float, log: Path, folder: Path) -> Outcome:
    """Run one stage in `folder`, with what it prints in `log`. Ends it, and all that it has started, at its limit."""
    if stage.impossible is not None:
        log.write_text(f"not run: {stage.impossible}\n", encoding="utf-8")
        return Outcome(stage.name, NOT_RUN, reason=stage.impossible)
    started = time.monotonic()
    environment = {**os.environ, **stage.environment, "PYTHONUNBUFFERED": "1"}
    streams = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                stage.command, cwd=folder, env=environment, stdout=output, start_new_session=True, **streams
            )
        except OSError as error:
            return Outcome(stage.name, FAILED, reason=f"{stage.command[0]} cannot be run: {error}")
        try:
            code = _wait(process, limit_s, log if stage.shown else None)
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
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return Outcome(stage.name, FAILED, seconds, reason)


def _wait(process: subprocess.Popen[bytes], limit_s: float, shown: Path | None) -> int:
    """The exit code, within the limit; what comes to the log that is `shown` is printed as it comes."""
    if shown is None:
        return process.wait(limit_s)
    end = time.monotonic() + limit_s
    with shown.open(encoding="utf-8", errors="replace") as text:
        while True:
            left = end - time.monotonic()
            try:
                return process.wait(min(left, 0.2))
            except subprocess.TimeoutExpired:
                if left <= 0.2:
                    raise
            finally:
                print(text.read(), end="", flush=True)


def read(log: Path) -> str:
    """The text of a log; empty where there is none."""
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """At an interrupt pytest writes its report, once no worker of its own keeps it waiting."""
    for end in (_interrupt, _kill_children):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            end(process.pid)
            process.wait(PATIENCE_S)
            break
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)  # and what it leaves behind
        process.wait(PATIENCE_S)


def _interrupt(group: int) -> None:
    os.killpg(group, signal.SIGINT)


def _kill_children(parent: int) -> None:
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
