"""`python -m nexus bench`: its arguments, and what can be refused before torch is imported."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from nexus.arguments import whole_number
from nexus.bench.cases import CASES

HOST = "host"
REFUSED, DISAGREED, INTERRUPTED = 2, 1, 130  # exit codes; the last is the shell's for Ctrl-C
MAX_REPEATS = 1_000_000
MAX_THREADS = 1024


class Refusal(Exception):
    """Something that the user can mend: one line with the cause and the remedy."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m nexus bench`."""
    add = parser.add_argument
    names = (*CASES, HOST)
    add("--case", choices=names, action="append", help="time this alone (may be given again); default: all")
    add("--quick", action="store_true", help="few repeats: seconds, and rough figures")
    add("--repeats", type=whole_number(1, MAX_REPEATS), help="timed pairs; default: as many as each case needs")
    add("--threads", type=whole_number(1, MAX_THREADS), help="CPU threads; default: as torch chooses")
    add("--out", help="write the rows to this JSON file; in a folder, it is named <date>_<cpu>.json")
    add("--picture", help="draw the speed-ups to this PNG file")


def run(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed.

    Returns:
        The exit code: 0; 1 where two optimizers disagree; 130 after Ctrl-C; 2 where one line on stderr says what
        must be mended first.
    """
    try:
        out, picture = _output(args.out), _output(args.picture)
        if picture is not None:
            if picture.is_dir():
                raise Refusal(f"--picture must be a file, and {picture} is a folder")
            _check_matplotlib(args.case)
        return _bench(args, out, picture)
    except Refusal as refusal:
        print(f"python -m nexus bench: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.", file=sys.stderr)
        return INTERRUPTED


def _bench(args: argparse.Namespace, out: Path | None, picture: Path | None) -> int:
    import torch

    from nexus.bench import report
    from nexus.bench.host import HostRow, measure_host
    from nexus.bench.measure import Disagreement, Row, measure

    threads_before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    data = report.metadata()
    chosen = args.case or [*CASES, HOST]
    rows: list[Row] = []
    host_rows: list[HostRow] = []
    try:
        print(report.headline(data), report.HEADING, sep="\n\n", flush=True)
        for case in (case for case in CASES.values() if case.name in chosen):
            available = _available_bytes()
            if available is not None and available < case.bytes_needed:
                need, have = case.bytes_needed / 1e9, available / 1e9
                print(f"{case.name}: left out, it needs {need:.1f} GB of memory and {have:.1f} GB are free")
                continue
            for row in measure(case, args.repeats or (case.quick_repeats if args.quick else case.repeats)):
                rows.append(row)
                print(report.line(row), flush=True)
        if HOST in chosen:
            print(f"\n{report.HOST_HEADING}")
            for host_row in measure_host(args.repeats or (20 if args.quick else 300)):
                host_rows.append(host_row)
                print(report.host_line(host_row), flush=True)
    except Disagreement as error:
        print(f"python -m nexus bench: {error}; nothing was written", file=sys.stderr)
        return DISAGREED
    finally:
        torch.set_num_threads(threads_before)
    if out is not None:
        path = out / report.file_name() if out.is_dir() else out
        report.write(path, data, rows, host_rows)
        print(f"\nRows: {path}")
    if picture is not None and rows:
        from nexus.bench.picture import draw

        draw(rows, data, picture)
        print(f"Picture: {picture}")
    return 0


def _output(name: str | None) -> Path | None:
    """Find out now, not after minutes, that a file cannot be written."""
    if name is None:
        return None
    path = Path(name)
    folder = path if path.is_dir() else path.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise Refusal(f"cannot write to the folder {folder} ({error.strerror}): give another") from error
    return path


def _check_matplotlib(chosen: list[str] | None) -> None:
    if chosen == [HOST]:
        raise Refusal(f"--picture draws speed-ups, and --case {HOST} has none")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise Refusal(f"--picture needs matplotlib ({error}): pip install 'nexus-optim[demo]'") from error


def _available_bytes() -> int | None:
    """Memory that a process may still take, where Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if kilobytes is None else int(kilobytes) * 1024
