"""What was measured, as records, and the JSON file that they make. Importing this needs no torch."""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nexus import __version__
from nexus.files import write_whole

if TYPE_CHECKING:
    from benchmarks.timing import Device

ROOT = Path(__file__).resolve().parents[1]
FORMAT = 2  # of the JSON file; it has the keys of format 1, and more


@dataclass(frozen=True)
class Spread:
    """A median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value; linear between the two nearest."""
        ordered = sorted(values)

        def quantile(q: float) -> float:
            at = q * (len(ordered) - 1)
            low = math.floor(at)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (at - low) * (ordered[high] - ordered[low])

        return cls(quantile(0.5), quantile(0.2), quantile(0.8))


@dataclass(frozen=True)
class Comparison:
    """Times in microseconds."""

    nexus: Spread
    peer: Spread | None  # None: it cannot do this
    ratio: Spread | None  # peer's time / nexus's time of each pair

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Comparison:
        """Of nexus's time and its peer's, each measured next to the other."""
        ours, theirs = zip(*pairs, strict=True)
        return cls(Spread.of(ours), Spread.of(theirs), Spread.of([b / a for a, b in pairs]))


@dataclass(frozen=True)
class Row:
    """nexus beside one peer at one job."""

    case: str
    title: str
    device: str
    dtype: str
    tensors: int
    elements: int
    groups: int
    job: str
    peer: str
    backend: str  # of nexus
    time: Comparison  # on a CPU until the call returns, on a GPU what the device takes
    pairs: int
    difference: float | None  # of the parameters afterwards, see Contestant.difference; in training of the losses
    bytes_moved: int | None  # that nexus needs to load and store; None: not counted, in training
    # On a GPU alone:
    host: Comparison | None = None  # what the host takes to enqueue a step
    replay: Comparison | None = None  # the device, replaying a CUDA graph of the step
    replay_host: Comparison | None = None  # the host, starting the replay
    loop: Comparison | None = None  # in training: wall-clock time of a step, of several in a row
    remark: str = ""

    def record(self) -> dict[str, Any]:
        """For the JSON file, with the times under the names that they had in format 1."""
        record = asdict(self)
        time = record.pop("time")
        medians = {"nexus_us": time["nexus"]["median"], "peer_us": time["peer"]["median"], "ratio": time["ratio"]}
        return {**record, **medians, "nexus_spread": time["nexus"], "peer_spread": time["peer"]}


@dataclass(frozen=True)
class LeftOut:
    """What is not among the rows, and why."""

    case: str
    job: str
    peer: str
    reason: str
    failed: bool  # by a fault of nexus's, or since the two sides disagree: the run has then failed


@dataclass(frozen=True)
class HostRow:
    """A quantity of the second table."""

    what: str
    unit: str
    value: Spread


@dataclass(frozen=True)
class KernelRow:
    """A step with clipping and schedule, taken apart by kernel on a GPU."""

    case: str
    title: str
    dtype: str
    tensors: int
    elements: int
    backend: str
    steps: int
    times: dict[str, Spread]  # microseconds of the device, of norm, prologue, update, and of a copy of as many bytes
    shares: dict[str, Spread]  # bytes a second over those of the copy, of norm, update and the whole step
    others: list[str]  # names of what else ran


@dataclass
class Results:
    """Of one run, as far as it has come."""

    metadata: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    host: list[HostRow] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    complete: bool = False


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
    write_json(path, {"format": FORMAT, **asdict(results), "rows": [row.record() for row in results.rows]})
    return path


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
