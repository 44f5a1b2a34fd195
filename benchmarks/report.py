"""The JSON file: the measurements, with everything needed to read them later. Importing this needs no torch."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import Results, Row
from nexus import __version__
from nexus.files import write_whole

if TYPE_CHECKING:
    from benchmarks.timing import Device

ROOT = Path(__file__).parents[1]
FORMAT = 2  # of the JSON file; it has the keys of format 1, and more


def metadata(device: Device) -> dict[str, Any]:
    """What the times depend on, and when they were taken."""
    import torch

    from nexus.backends import native

    extension = importlib.import_module("nexus._native") if native.unavailable() is None else None
    return {
        "device": device.kind,
        "date": now(),
        "nexus": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "thread_runtime": extension.thread_runtime() if extension else None,
        "instruction_set": extension.instruction_sets()[0] if extension else None,
        "load_average": list(os.getloadavg()),
        **device.metadata(),
    }


def write(path: Path, results: Results) -> Path:
    """Write the JSON file; in a folder, it is named after the date and the device. Returns where it is."""
    data = results.metadata
    if path.is_dir():
        path /= file_name(data["date"], data.get("gpu", data["cpu"]))
    write_json(path, {"format": FORMAT, **asdict(results), "rows": [_flat(row) for row in results.rows]})
    return path


def _flat(row: Row) -> dict[str, Any]:
    """The record of a row, with the times under the names that they had in format 1."""
    record = asdict(row)
    time = record.pop("time")
    medians = {"nexus_us": time["nexus"]["median"], "peer_us": time["peer"]["median"], "ratio": time["ratio"]}
    return {**record, **medians, "nexus_spread": time["nexus"], "peer_spread": time["peer"]}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


def file_name(date: str, device: str) -> str:
    """`<date>_<device>.json`, of an ISO date with or without its time and of what the device calls itself."""
    name = device.lower().replace("(r)", "").replace("(tm)", "")
    return f"{date.partition('T')[0]}_{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def now() -> str:
    """The local date and time with its zone, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def commit() -> str | None:
    """Of the checkout that this is; with a `+` if files have changed since.

    For a copy without its history, the environment's NEXUS_COMMIT says it.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("NEXUS_COMMIT") or None
    git = ["git", "-C", str(ROOT)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.decode().strip() + "+" * bool(changes.stdout.strip())


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()
