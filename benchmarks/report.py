"""The JSON file: the measurements, with everything needed to read them later."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.host import HostRow
from benchmarks.provenance import commit, file_name, write_json
from benchmarks.rows import LeftOut, Row
from benchmarks.timing import Cpu, Device
from nexus import __version__
from nexus.backends import native

FORMAT = 2  # of the JSON file; it has the keys of format 1, and more


@dataclass
class Results:
    """Of one run, as far as it has come."""

    metadata: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    host: list[HostRow] = field(default_factory=list)
    complete: bool = False


def metadata(device: Device | None = None) -> dict[str, Any]:
    """What the times depend on, and when they were taken. The device is the CPU by default."""
    device = device or Cpu()
    extension = importlib.import_module("nexus._native") if native.unavailable() is None else None
    return {
        "device": device.kind,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
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


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()
