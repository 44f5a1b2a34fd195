"""Checkpoints of the demo: plain types and tensors, written whole or not at all; reading one runs no code."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from gpt.errors import DemoError
from gpt.run import SCHEDULES

FORMAT = "nexus demo 1"
_START_OVER = "or leave out --resume to start over"


class CheckpointError(DemoError):
    """A checkpoint that cannot be used; the message names the file, the cause and the remedy."""


def write(path: Path, state: dict[str, Any]) -> None:
    """Put `state` at `path` in one atomic move, so that a failure half-way leaves what was there before."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """What `write` put at `path`.

    Raises:
        CheckpointError: there is none, it is damaged, or something else wrote it. It is left as it is.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path} to go on from: leave out --resume to start")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(_damaged(path, f"the checksum of {damaged} is wrong"))
        state = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, pickle and torch each have their own
        raise CheckpointError(_damaged(path, _first_line(error))) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this demo: give another --out, {_START_OVER}")
    return state


def unfit(path: Path, cause: Exception) -> CheckpointError:
    """The error for a whole checkpoint of this demo whose contents do not fit the run."""
    return CheckpointError(f"{path} does not fit this run ({_first_line(cause)}): {_START_OVER[3:]}")


def _damaged(path: Path, cause: str) -> str:
    return f"{path} is damaged ({cause}): restore it from a copy, {_START_OVER}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def require_same_run(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a `CheckpointError` that names the first thing in which the saved run is not the one `wanted`."""
    run = saved.get("run")
    run = run if isinstance(run, dict) else {}
    for name, value in wanted.items():
        was = run.get(name)
        if was == value:
            continue
        if name == "schedule" and isinstance(was, dict) and was.get("type") != value["type"]:
            was, value = (SCHEDULES.get(str(schedule.get("type"))) for schedule in (was, value))
        if name == "text":
            cause, remedy = "the standard library of another Python", "run it with that Python"
        elif isinstance(was, (int, str)):
            cause, remedy = f"--{name} {was}, not {value}", f"give --{name} {was}"
        else:
            cause, remedy = f"another {name} of the demo", "use the version of nexus that made it"
        raise CheckpointError(f"{path} was made with {cause}: {remedy}, {_START_OVER}")
