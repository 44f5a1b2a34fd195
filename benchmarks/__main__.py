"""`python -m benchmarks`: its arguments, and what becomes of the rows."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import peers, report, table, timing
from benchmarks.busy import busy_core
from benchmarks.cases import (
    CASES,
    COPY,
    CPU,
    CUDA,
    FLOAT32,
    OTHERS,
    QUICK,
    TRAINING_CASES,
    AnyCase,
    Case,
    TrainingCase,
)
from benchmarks.gpu_summary import TARGETS
from benchmarks.host import measure_host
from benchmarks.kernels import KERNELS, QUICK_REPEATS, REPEATS, measure_kernels
from benchmarks.measure import QUICK_LIMIT_S, measure
from benchmarks.report import LeftOut, Results
from benchmarks.timing import Device
from nexus.arguments import Parser, whole_number
from nexus.backends import describe, select
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
    add("--quick", action="store_true", help="few cases and repeats: half a minute, and rough figures")
    add("--peers", action="store_true", help="beside the optimizers of other packages, too, where they are installed")
    add("--busy", action="store_true", help="while another process keeps one core busy, as loading data does")
    add("--backend", choices=[info.name for info in describe()], help="of nexus; default: the best")
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
        cases = _cases(args.case or _default_names(args, device.kind), device.kind)
        _check_backend(args, cases)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        with busy_core() if args.busy else contextlib.nullcontext() as core:
            return _bench(args, device, cases, core)
    except Refusal as refusal:
        print(f"python -m benchmarks: {refusal}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        written = "the rows above are" if args.out else "nothing was"
        print(f"\nStopped; {written} written.", file=sys.stderr)
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads_before)


def _bench(args: argparse.Namespace, device: Device, cases: list[AnyCase], busy: int | None) -> int:
    results = Results({**report.metadata(device), "busy_core": busy})
    print(table.headline(results.metadata), flush=True)
    if args.quick and args.case is None:
        others = [case.name for case in _cases(None, device.kind) if case not in cases]
        print(f"Left out to be quick: {', '.join(others)}, and most repeats.", flush=True)
    if args.peers:
        cases = [_with_peers(case, results) for case in cases]
    for before, case in zip([None, *cases], cases, strict=False):
        if type(before) is not type(case):
            print("", table.heading(device.kind, isinstance(case, TrainingCase)), sep="\n", flush=True)
        _measure(case, args, device, results)
    if device.kind == CPU and (HOST in args.case if args.case else args.backend is None):
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
    limit_s = QUICK_LIMIT_S if args.quick and device.kind == CPU else None
    for row in measure(case, repeats, device, args.backend or "auto", limit_s):
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


def _default_names(args: argparse.Namespace, device: str) -> list[str] | None:
    """Of the cases that are timed where none is named; None: all."""
    if device == CPU and args.quick:
        return [name for name in QUICK if name in CASES or args.backend is None]
    return [name for name, case in CASES.items() if device in case.by_default] if args.backend else None


def _check_backend(args: argparse.Namespace, cases: list[AnyCase]) -> None:
    """Refuse a backend where it would not be used, or cannot be."""
    if args.backend is None:
        return
    others = [case.name for case in cases if isinstance(case, TrainingCase)]
    others += [name for name in (HOST, KERNELS) if name in (args.case or ())]
    if others:
        raise Refusal(f"--backend is for steps of the optimizer alone: leave out --case {others[0]}")
    try:
        select(args.backend, [torch.device(args.device)])
    except (ValueError, RuntimeError) as error:
        raise Refusal(str(error)) from error


def _with_peers(case: AnyCase, results: Results) -> AnyCase:
    """Beside those of other packages that are installed; the others are left out, which is said once."""
    if not isinstance(case, Case) or case.mode or case.average or case.dtype != FLOAT32:
        return case
    reasons = {name: peers.unavailable(name) for name in OTHERS}
    for name, reason in reasons.items():
        left_out = LeftOut("all", "all", name, reason or "", failed=False)
        if reason is not None and left_out not in results.left_out:
            results.left_out.append(left_out)
            print(table.left_out_line(left_out), flush=True)
    return replace(case, peers=(*case.peers, *(name for name, reason in reasons.items() if reason is None)))


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
