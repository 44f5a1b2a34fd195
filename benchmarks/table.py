"""What is printed of the measurements."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import COPY, CPU, CUDA, NORM, PROLOGUE, STEP, TRAINING_CASES, UPDATE
from benchmarks.report import Comparison, HostRow, KernelRow, LeftOut, Row, Spread

PEER_NAMES = {COPY: "copy of as much"}
RATE = "steps a second"
DEVICE_AND_HOST = {"µs of the device": "time", "µs of the host": "host"}
COLUMNS = {  # field of a row by the column's title; for each kind of device, of steps and of whole training steps
    (CPU, False): {"µs": "time"},
    (CPU, True): {RATE: "time"},
    (CUDA, False): {**DEVICE_AND_HOST, "replay: device": "replay", "replay: host": "replay_host"},
    (CUDA, True): {RATE: "loop", **DEVICE_AND_HOST},
}
HOST_HEADING = f"{'host time':<60} {'median [p20, p80]'}"


def heading(device: str, training: bool = False) -> str:
    """Over the rows, of steps of the optimizer or of whole training steps."""
    columns = list(COLUMNS[device, training])
    below = _aligned("case", "job", "peer", ["nexus / peer"] * len(columns), "times as fast [p20, p80]")
    return f"{_aligned('', '', '', columns, '').rstrip()}\n{below}"


def line(row: Row) -> str:
    """A row of the table."""
    columns = COLUMNS[row.device, row.case in TRAINING_CASES]
    cells = [_both(getattr(row, field), per_second=title == RATE) for title, field in columns.items()]
    ratio = (row.loop or row.time).ratio
    speed = "" if ratio is None else _spread(ratio)
    remark = f" ({row.remark})" if row.remark else ""
    return _aligned(row.case, row.job, PEER_NAMES.get(row.peer, row.peer), cells, speed + remark)


def _both(times: Comparison | None, per_second: bool) -> str:
    if times is None:
        return ""
    medians = [None if side is None else side.median for side in (times.nexus, times.peer)]
    return " / ".join("–" if us is None else figures(1e6 / us if per_second else us) for us in medians)


def _aligned(case: str, job: str, peer: str, columns: list[str], last: str) -> str:
    return f"{case:<12} {job:<24} {peer:<22}{''.join(f'{column:>20}' for column in columns)}  {last}"


def kernel_line(row: KernelRow) -> str:
    """A row of the table of kernels."""
    cells = [figures(spread.median) for spreads in (row.times, row.shares) for spread in spreads.values()]
    others = f"beside {', '.join(row.others)}" if row.others else ""
    return _kernels(row.case, row.backend, cells, others)


def kernel_heading() -> str:
    """Over the rows of kernels."""
    times = [f"{part}, µs" for part in (NORM, PROLOGUE, UPDATE, COPY)]
    return _kernels("case", "backend", times + [f"{what}/copy" for what in (NORM, UPDATE, STEP)], "bytes a second")


def _kernels(case: str, backend: str, cells: list[str], last: str) -> str:
    return f"{case:<14}{backend:<8}{''.join(f'{cell:>14}' for cell in cells)}  {last}".rstrip()


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
    core = data.get("busy_core")
    beside = "" if core is None else f"\nAnother process keeps core {core} busy on purpose."
    warning = "\nThis machine is busy with something else: do not rely on the figures below." if busy else ""
    return (
        f"nexus {data['nexus']}{source}, torch {data['torch']}, Python {data['python']}\n"
        f"{conditions(data)}; load average {data['load_average'][0]:.2f}{warning}{beside}"
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


def _spread(value: Spread) -> str:
    return f"{figures(value.median)} [{figures(value.p20)}, {figures(value.p80)}]"
