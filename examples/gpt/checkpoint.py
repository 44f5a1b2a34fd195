"""Checkpoints of the demo: plain types and tensors, written whole or not at all; reading one runs no code."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt import DemoError
from gpt.run import SCHEDULES
from nexus.files import write_whole

FORMAT = "nexus demo 1"
_START_OVER = "leave out --resume to start over"


def write(path: Path, state: dict[str, Any]) -> None:
    """Put `state` at `path`, whole or not at all."""
    write_whole(path, partial(torch.save, {"format": FORMAT, **state}))


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """What `write` put at `path`.

    Raises:
        DemoError: there is none, it is damaged, or something else wrote it. It is left as it is.
    """
    if not path.is_file():
        raise DemoError(f"there is no {path} to go on from: leave out --resume to start")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            wrong = archive.testzip()
        state = None if wrong else torch.load(path, map_location=device, weights_only=True)
        cause = f"the checksum of {wrong} is wrong" if wrong else ""
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, pickle and torch each have their own
        cause = _first_line(error)
    if cause:
        raise DemoError(f"{path} is damaged ({cause}): restore it from a copy, or {_START_OVER}")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DemoError(f"{path} is not a checkpoint of this demo: give another --out, or {_START_OVER}")
    run = state.get("run")
    return {**state, "run": run if isinstance(run, dict) else {}}


def unfit(path: Path, cause: Exception) -> DemoError:
    """The error for a whole checkpoint of this demo whose contents do not fit the run."""
    return DemoError(f"{path} does not fit this run ({_first_line(cause)}): {_START_OVER}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def require_same_run(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise a `DemoError` that names the first thing in which the config `saved` is not the one `wanted`."""
    for name, value in wanted.items():
        was = saved.get(name)
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
        raise DemoError(f"{path} was made with {cause}: {remedy}, or {_START_OVER}")
