"""What is printed of the measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import COPY, CUDA, TRAINING_CASES
from benchmarks.rows import Comparison, HostRow, LeftOut, Row, Spread

PEER_NAMES = {COPY: "copy of as much"}
SPEED = "times as fast [p20, p80]"
HOST_HEADING = f"{'host time':<60} {'median [p20, p80]'}"

_LINE = "{:<7} {:>7} {:>11}  {:<22} {:>9}  {:<18} {:>9}  {}"
_CUDA_LINE = "{:<12} {:<22}  {:<18} {:>19} {:>19}  {:>19} {:>19}  {}"
_TRAINING_LINE = "{:<11} {:<24} {:<22} {:>17}  {}"
_CUDA_TRAINING_LINE = "{:<11} {:<24} {:<22} {:>17} {:>19} {:>17}  {}"


def heading(device: str, training: bool = False) -> str:
    """Over the rows, of steps of the optimizer or of whole training steps."""
    times = ["µs of the device", "µs of the host"]
    if training:
        columns = ["steps a second", *times] if device == CUDA else ["steps a second"]
        line = _CUDA_TRAINING_LINE if device == CUDA else _TRAINING_LINE
    elif device == CUDA:
        columns, line = [*times, "replay: device", "replay: host"], _CUDA_LINE
    else:
        names = ("case", "tensors", "elements", "job", "nexus µs", "torch's AdamW", "its µs", f"nexus is … {SPEED}")
        return _LINE.format(*names)
    below = line.format("case", "job", "peer", *["nexus / peer"] * len(columns), SPEED)
    return f"{line.format('', '', '', *columns, '').rstrip()}\n{below}"


def line(row: Row) -> str:
    """A row of the table."""
    names = (row.case, row.job, PEER_NAMES.get(row.peer, row.peer))
    if row.case in TRAINING_CASES:
        whole = row.loop or row.time
        rates = " / ".join("–" if us is None else figures(1e6 / us.median) for us in (whole.nexus, whole.peer))
        if row.device == CUDA:
            return _CUDA_TRAINING_LINE.format(*names, rates, _both(row.time), _both(row.host), _ratio(whole))
        return _TRAINING_LINE.format(*names, rates, _ratio(whole))
    if row.device == CUDA:
        times = (_both(part) for part in (row.time, row.host, row.replay, row.replay_host))
        return _CUDA_LINE.format(*names, *times, _ratio(row.time)) + (f" ({row.remark})" if row.remark else "")
    case, job, peer = names
    nexus, its = _median(row.time.nexus), _median(row.time.peer)
    return _LINE.format(case, row.tensors, f"{row.elements:,}", job, nexus, peer, its, _ratio(row.time))


def left_out_line(left_out: LeftOut) -> str:
    """What stands instead of a row."""
    what = f"{left_out.case}, {left_out.job}, {PEER_NAMES.get(left_out.peer, left_out.peer)}"
    return f"{what}: left out, {left_out.reason}"


def host_line(row: HostRow) -> str:
    """A row of the second table."""
    value = row.value
    text = figures(value.median) if value.p20 == value.p80 else _spread(value)
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
    threads = f"{data['threads']} thread{'s' * (data['threads'] > 1)}"
    cpu = f"{data['cpu']}, {data['cores']} cores{sets}; {threads}"
    if "gpu" not in data:
        return cpu
    return f"{data['gpu']}, driver {data['driver']}, CUDA {data['cuda']}, Triton {data['triton']}; {cpu}"


def figures(value: float) -> str:
    """Three figures, but no more than three decimals."""
    if value == 0:
        return "0"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def _ratio(times: Comparison) -> str:
    return "" if times.ratio is None else _spread(times.ratio)


def _spread(value: Spread) -> str:
    return f"{figures(value.median)} [{figures(value.p20)}, {figures(value.p80)}]"


def _both(times: Comparison | None) -> str:
    return "" if times is None else f"{_median(times.nexus)} / {_median(times.peer)}"


def _median(spread: Spread | None) -> str:
    return "–" if spread is None else figures(spread.median)
