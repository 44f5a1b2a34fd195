"""What is told of the measurements: a table, and a JSON file with everything needed to read it later."""

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
from typing import Any

import torch

from nexus import __version__
from nexus.backends import native
from nexus.bench.cases import TRAFFIC
from nexus.bench.host import HostRow
from nexus.bench.measure import Row

FORMAT = 1  # of the JSON file
PEER_NAMES = {TRAFFIC: "same traffic alone"}

_LINE = "{:<7} {:>7} {:>11}  {:<22} {:>9}  {:<18} {:>9}  {}"
HEADING = _LINE.format(
    "case", "tensors", "elements", "job", "nexus µs", "torch's AdamW", "its µs", "nexus is … times as fast [p20, p80]"
)
HOST_HEADING = f"{'host time':<60} {'median [p20, p80]'}"


def line(row: Row) -> str:
    """A row of the table."""
    ratio = f"{_figures(row.ratio.median)} [{_figures(row.ratio.p20)}, {_figures(row.ratio.p80)}]"
    if row.peer == TRAFFIC:
        ratio += " of that limit"
    return _LINE.format(
        row.case,
        row.tensors,
        f"{row.elements:,}",
        row.job,
        microseconds(row.nexus_us),
        PEER_NAMES.get(row.peer, row.peer),
        microseconds(row.peer_us),
        ratio,
    )


def host_line(row: HostRow) -> str:
    """A row of the second table."""
    value = row.value
    text = _figures(value.median)
    if value.p20 != value.p80:
        text += f" [{_figures(value.p20)}, {_figures(value.p80)}]"
    return f"{row.what:<60} {text} {row.unit}".rstrip()


def microseconds(value: float) -> str:
    """Three figures or more."""
    return f"{value:,.0f}" if value >= 100 else _figures(value)


def _figures(value: float) -> str:
    """Three figures, but no more than three decimals."""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def metadata() -> dict[str, Any]:
    """What the times depend on, and when they were taken."""
    extension = importlib.import_module("nexus._native") if native.unavailable() is None else None
    return {
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
    }


def headline(data: dict[str, Any]) -> str:
    """Two lines of the metadata, and a third where the times will not mean much."""
    source = f" ({data['commit']})" if data["commit"] else ""
    sets = f", {data['instruction_set']}" if data["instruction_set"] else ""
    busy = data["load_average"][0] > 0.5 * (data["cores"] or 1)
    warning = "\nThis machine is busy with something else: do not rely on the figures below." if busy else ""
    return (
        f"nexus {data['nexus']}{source}, torch {data['torch']}, Python {data['python']}\n"
        f"{data['cpu']}, {data['cores']} cores{sets}; {threads(data)}; "
        f"load average {data['load_average'][0]:.2f}{warning}"
    )


def threads(data: dict[str, Any]) -> str:
    """How many, in words."""
    return f"{data['threads']} thread{'s' * (data['threads'] > 1)}"


def write(path: Path, data: dict[str, Any], rows: list[Row], host_rows: list[HostRow]) -> None:
    """Write the JSON file, whole or not at all."""
    content = {
        "format": FORMAT,
        "metadata": data,
        "rows": [asdict(row) for row in rows],
        "host": [asdict(row) for row in host_rows],
    }
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def file_name() -> str:
    """`<date>_<cpu>.json`."""
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_name().lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    return f"{datetime.date.today().isoformat()}_{slug}.json"


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def commit() -> str | None:
    """Of the checkout that nexus is imported from, if it is one; with a `+` if files have changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.decode().strip() + "+" * bool(changes.stdout.strip())
