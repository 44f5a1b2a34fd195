"""`python -m benchmarks`: its arguments, and what becomes of the rows."""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report, table, timing
from benchmarks.cases import CASES, COPY, CPU, CUDA, TRAINING_CASES, AnyCase, TrainingCase
from benchmarks.gpu_summary import TARGETS
from benchmarks.host import measure_host
from benchmarks.kernels import KERNELS, QUICK_REPEATS, REPEATS, measure_kernels
from benchmarks.measure import measure
from benchmarks.report import LeftOut, Results
from benchmarks.timing import Device
from nexus.arguments import Parser, whole_number
from nexus.plot import checked_path

HOST = "host"
REFUSED, FAILED, INTERRUPTED = 2, 1, 130  # exit codes; the last is the shell's for Ctrl-C
MAX_REPEATS = 1_000_000
MAX_THREADS = 1024


class Refusal(Exception):
    """Something that the user can mend: one line with the cause and the remedy."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what the arguments say.

    Returns:
        The exit code: 0; 1 where nexus fails, or disagrees with a peer; 130 after Ctrl-C; 2 where one line on
        stderr says what must be mended first.
    """
    parser = Parser(
        prog="python -m benchmarks", description="Time the optimizer beside torch's and others.", allow_abbrev=False
    )
    add = parser.add_argument
    names = (*CASES, *TRAINING_CASES, HOST, KERNELS)
    add("--device", choices=(CPU, CUDA), default=CPU, help=f"where the parameters are; default: {CPU}")
    add("--case", choices=names, action="append", help="time this alone (may be given again); default: all")
    add("--quick", action="store_true", help="few repeats: seconds, and rough figures")
    add("--repeats", type=whole_number(1, MAX_REPEATS), help="timed pairs, at most; default: as each case needs")
    add("--threads", type=whole_number(1, MAX_THREADS), help="CPU threads; default: as torch chooses")
    add("--out", help="write the rows to this JSON file; in a folder, it is named <date>_<device>.json")
    add("--picture", help="draw the speed-ups to this PNG, SVG or PDF file")
    return parser.run(argv, _run)


def _run(args: argparse.Namespace) -> int:
    threads_before = torch.get_num_threads()
    try:
        _check_outputs(args)
        device = _device(args.device)
        cases = _cases(args.case, device.kind)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        return _bench(args, device, cases)
    except Refusal as refusal:
        print(f"python -m benchmarks: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        written = "the rows above are" if args.out else "nothing was"
        print(f"\nStopped; {written} written.", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads_before)


def _bench(args: argparse.Namespace, device: Device, cases: list[AnyCase]) -> int:
    results = Results(report.metadata(device))
    print(table.headline(results.metadata), flush=True)
    for before, case in zip([None, *cases], cases, strict=False):
        if type(before) is not type(case):
            print("", table.heading(device.kind, isinstance(case, TrainingCase)), sep="\n", flush=True)
        _measure(case, args, device, results)
    if device.kind == CPU and (args.case is None or HOST in args.case):
        print(f"\n{table.HOST_HEADING}")
        for row in measure_host(args.repeats or (20 if args.quick else 300)):
            results.host.append(row)
            print(table.host_line(row), flush=True)
    if KERNELS in (args.case or ()):
        _measure_kernels(args, device, results)
    results.complete = True
    if args.out is not None:
        print(f"\nRows: {report.write(Path(args.out), results)}")
    if args.picture is not None:
        _draw(results, Path(args.picture))
    return FAILED if any(left_out.failed for left_out in results.left_out) else 0


def _measure(case: AnyCase, args: argparse.Namespace, device: Device, results: Results) -> None:
    reason = device.lacks(case.bytes_needed(device.kind))
    if reason is not None:
        results.left_out.append(LeftOut(case.name, "all", "all", reason, failed=False))
        print(f"{case.name}: left out, {reason}", flush=True)
        return
    repeats = args.repeats or (case.quick_repeats if args.quick else case.repeats)
    for row in measure(case, repeats, device):
        if isinstance(row, LeftOut):
            results.left_out.append(row)
            print(table.left_out_line(row), file=sys.stderr if row.failed else sys.stdout, flush=True)
        else:
            results.rows.append(row)
            print(table.line(row), flush=True)
        if args.out is not None:
            report.write(Path(args.out), results)  # the next row may take the process with it


def _measure_kernels(args: argparse.Namespace, device: Device, results: Results) -> None:
    print(f"\n{table.kernel_heading()}", flush=True)
    for row in measure_kernels(args.repeats or (QUICK_REPEATS if args.quick else REPEATS), device):
        if isinstance(row, LeftOut):
            results.left_out.append(row)
            print(table.left_out_line(row), flush=True)
        else:
            results.kernels.append(row)
            print(table.kernel_line(row), flush=True)
        if args.out is not None:
            report.write(Path(args.out), results)


def _draw(results: Results, picture: Path) -> None:
    """The optimizer's steps, and beside it, in a picture of their own, whole training steps."""
    from benchmarks.picture import draw

    steps = [row for row in results.rows if row.case in CASES and row.peer != COPY]
    training = [row for row in results.rows if row.case in TRAINING_CASES]
    for rows, path in ((steps, picture), (training, picture.with_stem(f"{picture.stem}-training"))):
        if rows:
            draw(rows, results.metadata, path)
            print(f"Picture: {path}")


def _device(wanted: str) -> Device:
    if wanted == CPU:
        return timing.PROCESSOR
    reason = timing.cuda_unavailable()
    if reason is not None:
        raise Refusal(f"--device {CUDA} cannot be had: {reason}")
    return timing.Cuda()


def _cases(wanted: list[str] | None, device: str) -> list[AnyCase]:
    """Those that were asked for, in that order; by default all that this kind of device has."""
    every: dict[str, AnyCase] = {**CASES, **TRAINING_CASES}
    if wanted is None:
        cases = [case for case in every.values() if device in case.by_default]
        if device == CUDA:  # a run on a GPU may be cut short: what says the most comes first
            aimed_at = {target.case for target in TARGETS}
            cases.sort(key=lambda case: (case.name not in aimed_at, CPU in case.devices))
        return cases
    for name, where in ((HOST, CPU), (KERNELS, CUDA)):
        if name in wanted and device != where:
            raise Refusal(f"--case {name} is for {where}: add --device {where}")
    cases = [every[name] for name in dict.fromkeys(wanted) if name in every]
    for case in cases:
        if device not in case.devices:
            raise Refusal(f"--case {case.name} is for {' or '.join(case.devices)}, and this is {device}")
    return cases


def _check_outputs(args: argparse.Namespace) -> None:
    """Find out now, not after minutes, that a file cannot be written."""
    for path in (Path(name) for name in (args.out, args.picture) if name is not None):
        folder = path if path.is_dir() else path.parent
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise Refusal(f"cannot write to the folder {folder} ({error.strerror}): give another") from error
    if args.picture is None:
        return
    if Path(args.picture).is_dir():
        raise Refusal(f"--picture must be a file, and {args.picture} is a folder")
    try:
        checked_path(args.picture)
    except ValueError as error:
        raise Refusal(f"--picture: {error}") from error
    if args.case in ([HOST], [KERNELS]):
        raise Refusal(f"--picture draws speed-ups, and --case {args.case[0]} has none")
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise Refusal(f"--picture needs matplotlib ({error}): pip install 'nexus-optim[plot]'") from error


if __name__ == "__main__":
    sys.exit(main())
