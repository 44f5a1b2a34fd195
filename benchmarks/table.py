"""What is printed of the measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import COPY, CUDA
from benchmarks.host import HostRow
from benchmarks.rows import Comparison, LeftOut, Row, Spread
from benchmarks.training_cases import TRAINING_CASES

PEER_NAMES = {COPY: "copy of as much"}

_LINE = "{:<7} {:>7} {:>11}  {:<22} {:>9}  {:<18} {:>9}  {}"
HEADING = _LINE.format(
    "case", "tensors", "elements", "job", "nexus µs", "torch's AdamW", "its µs", "nexus is … times as fast [p20, p80]"
)
_CUDA_LINE = "{:<12} {:<22}  {:<18} {:>19} {:>19}  {:>19} {:>19}  {}"
CUDA_HEADING = "\n".join(
    (
        _CUDA_LINE.format("", "", "", "µs of the device", "µs of the host", "replay: device", "replay: host", ""),
        _CUDA_LINE.format("case", "job", "peer", *["nexus / peer"] * 4, "times as fast [p20, p80]"),
    )
)
_TRAINING_LINE = "{:<11} {:<24} {:<22} {:>17}  {}"
_CUDA_TRAINING_LINE = "{:<11} {:<24} {:<22} {:>17} {:>19} {:>17}  {}"
HOST_HEADING = f"{'host time':<60} {'median [p20, p80]'}"


def heading(device: str) -> str:
    """Over the rows."""
    return CUDA_HEADING if device == CUDA else HEADING


def training_heading(device: str) -> str:
    """Over the rows of whole training steps."""
    columns = ["steps a second", "µs of the device", "µs of the host"][: 3 if device == CUDA else 1]
    of = _CUDA_TRAINING_LINE if device == CUDA else _TRAINING_LINE
    names = ("case", "job", "peer", *["nexus / peer"] * len(columns), "times as fast [p20, p80]")
    return f"{of.format('', '', '', *columns, '').rstrip()}\n{of.format(*names)}"


def line(row: Row) -> str:
    """A row of the table."""
    if row.case in TRAINING_CASES:
        return _training_line(row)
    speed = _ratio(row.time)
    if row.device == CUDA:
        times = (_both(part) for part in (row.time, row.host, row.replay, row.replay_host))
        text = _CUDA_LINE.format(row.case, row.job, PEER_NAMES.get(row.peer, row.peer), *times, speed)
        return text + (f" ({row.remark})" if row.remark else "")
    return _LINE.format(
        row.case,
        row.tensors,
        f"{row.elements:,}",
        row.job,
        microseconds(row.time.nexus.median),
        PEER_NAMES.get(row.peer, row.peer),
        _median(row.time.peer),
        speed,
    )


def _training_line(row: Row) -> str:
    whole = row.loop or row.time
    rates = " / ".join("–" if us is None else figures(1e6 / us.median) for us in (whole.nexus, whole.peer))
    if row.device == CUDA:
        times = (_both(row.time), _both(row.host))
        return _CUDA_TRAINING_LINE.format(row.case, row.job, row.peer, rates, *times, _ratio(whole))
    return _TRAINING_LINE.format(row.case, row.job, row.peer, rates, _ratio(whole))


def left_out_line(left_out: LeftOut) -> str:
    """What stands instead of a row."""
    what = f"{left_out.case}, {left_out.job}, {PEER_NAMES.get(left_out.peer, left_out.peer)}"
    return f"{what}: left out, {left_out.reason}"


def host_line(row: HostRow) -> str:
    """A row of the second table."""
    text = figures(row.value.median)
    if row.value.p20 != row.value.p80:
        text += f" [{figures(row.value.p20)}, {figures(row.value.p80)}]"
    return f"{row.what:<60} {text} {row.unit}".rstrip()


def headline(data: dict[str, Any]) -> str:
    """Two lines of the metadata, and a third where the times will not mean much."""
    source = f" ({data['commit']})" if data["commit"] else ""
    busy = data["load_average"][0] > 0.5 * (data["cores"] or 1)
    warning = "\nThis machine is busy with something else: do not rely on the figures below." if busy else ""
    return (
        f"nexus {data['nexus']}{source}, torch {data['torch']}, Python {data['python']}\n"
        f"{conditions(data)}; load average {data['load_average'][0]:.2f}{warning}"
    )


def conditions(data: dict[str, Any]) -> str:
    """The hardware, in words."""
    sets = f", {data['instruction_set']}" if data["instruction_set"] else ""
    cpu = f"{data['cpu']}, {data['cores']} cores{sets}; {threads(data)}"
    if "gpu" not in data:
        return cpu
    return f"{data['gpu']}, driver {data['driver']}, CUDA {data['cuda']}, Triton {data['triton']}; {cpu}"


def threads(data: dict[str, Any]) -> str:
    """How many, in words."""
    return f"{data['threads']} thread{'s' * (data['threads'] > 1)}"


def microseconds(value: float) -> str:
    """Three figures or more."""
    return f"{value:,.0f}" if value >= 100 else figures(value)


def figures(value: float) -> str:
    """Three figures, but no more than three decimals."""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _ratio(times: Comparison) -> str:
    ratio = times.ratio
    return "" if ratio is None else f"{figures(ratio.median)} [{figures(ratio.p20)}, {figures(ratio.p80)}]"


def _both(times: Comparison | None) -> str:
    return "" if times is None else f"{_median(times.nexus)} / {_median(times.peer)}"


def _median(spread: Spread | None) -> str:
    return "–" if spread is None else microseconds(spread.median)
