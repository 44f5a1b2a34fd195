"""One call of the demo, from the arguments to the report."""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from gpt import INTERRUPTED, DemoError, checkpoint, corpus, picture, report
from gpt.progress import interruptible, progress
from gpt.report import time_step
from gpt.run import RunConfig, Size, schedule_for
from gpt.train import Training, reproducible
from nexus import __version__, backends

CHECKPOINT, PICTURE = "checkpoint.pt", "loss_and_rate.png"
SIZE = Size()
# A second thread makes a step of this size a fifth faster on an idle machine, and thirty times slower where another
# program wants the same core: OpenMP's threads wait for each other by spinning, a hundred times in a step.
THREADS = 1


def run(args: argparse.Namespace) -> int:
    """Train, or go on training, and report; returns the exit code.

    Raises:
        DemoError: something that the user can mend.
    """
    out = Path(args.out)
    device = _device(args.device)
    _check_folder(out, create=not args.resume)
    saved = checkpoint.read(out / CHECKPOINT, torch.device(device)) if args.resume else None
    text = corpus.load(torch.device(device))
    config = RunConfig(
        steps=args.steps,
        schedule=schedule_for(args.schedule, args.steps),
        seed=args.seed,
        size=SIZE,
        device=device,
        threads=_threads(args, saved),
        text=text.fingerprint,
    )
    command = _command(args, config)
    with reproducible(config):
        training = Training(config, text)
        if saved is not None:
            _restore(training, saved, out / CHECKPOINT)
            if training.after is not None and (out / PICTURE).is_file():
                bits = f"{training.before:.3f} -> {training.after:.3f} bits per byte"
                print(f"This run is finished: {training.step:,} steps, {bits}, picture {out / PICTURE}.")
                print("Without --resume it starts over.")
                return 0
        if training.step < config.steps and not _train(training, out, command):
            return INTERRUPTED
        try:
            _report(training, out)
        except KeyboardInterrupt:
            print(f"\nThe training is done and saved. Its report is made by:\n  {command}", file=sys.stderr)
            return INTERRUPTED
    return 0


def _device(name: str) -> str:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise DemoError("--device cuda: torch finds no CUDA device here; give --device cpu")
    try:
        backends.select("auto", [torch.device("cuda")])
    except (ValueError, RuntimeError) as error:
        if name == "auto":
            return "cpu"
        raise DemoError(f"--device cuda: {error}; give --device cpu") from error
    return "cuda"


def _check_folder(out: Path, *, create: bool) -> None:
    """Find out now, not after two minutes, that the results cannot be written."""
    try:
        if out.exists() and not out.is_dir():
            raise DemoError(f"--out must be a folder, and {out} is a file")
        if create:
            out.mkdir(parents=True, exist_ok=True)
        if out.exists():
            tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise DemoError(f"cannot write to the folder {out} ({error.strerror}): give another --out") from error


def _command(args: argparse.Namespace, config: RunConfig) -> str:
    """What to type to go on with this run."""
    options = {
        "--schedule": args.schedule,
        "--steps": config.steps,
        "--device": config.device,
        "--out": args.out,
        "--seed": config.seed,
        "--threads": config.threads,
    }
    words = [str(word) for option in options.items() for word in option]
    return shlex.join([sys.executable, str(Path(__file__).parent), *words, "--resume"])


def _threads(args: argparse.Namespace, saved: dict[str, Any] | None) -> int:
    """As many as were asked for; else those of the run that is gone on with."""
    then = saved["run"].get("threads") if saved is not None else None
    return args.threads or (then if isinstance(then, int) and then > 0 else THREADS)


def _made_by(training: Training) -> dict[str, str]:
    """What a run's last bits may depend on beside its config."""
    return {
        "nexus": __version__,
        "torch": str(torch.__version__),
        "backend": training.optimizer.backend,
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _restore(training: Training, saved: dict[str, Any], path: Path) -> None:
    checkpoint.require_same_run(path, saved["run"], training.config.to_dict())
    try:
        then = dict(saved["made_by"])
        training.load_state_dict(saved)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise checkpoint.unfit(path, error) from error
    now = _made_by(training)
    changed = ", ".join(f"{name} {then.get(name)} is now {now[name]}" for name in now if then.get(name) != now[name])
    if changed:
        print(f"The last bits may differ from those of an uninterrupted run: {changed}.", file=sys.stderr)


def _save(training: Training, out: Path) -> None:
    path = out / CHECKPOINT
    try:
        checkpoint.write(path, {**training.state_dict(), "made_by": _made_by(training)})
    except OSError as error:
        raise DemoError(f"cannot write {path} ({error.strerror or error}): what was there is kept") from error


def _train(training: Training, out: Path, command: str) -> bool:
    """Train to the end and save; or, on Ctrl-C, save, say how to go on, and return False."""
    config, first = training.config, training.step
    with interruptible() as interrupted:
        if training.before is None:
            training.before = training.held_out_bits()
        with progress(config.schedule, first, config.steps, training.bytes_a_step) as show:
            training.train(interrupted, show)
        if training.step > first:
            _save(training, out)
    if not interrupted():
        return True
    if training.step == first:
        print("\nStopped before a step was made; nothing was written.", file=sys.stderr)
    else:
        done = f"Stopped after {training.step:,} of {config.steps:,} steps and saved {out / CHECKPOINT}."
        print(f"\n{done} To go on:\n  {command}", file=sys.stderr)
    return False


def _report(training: Training, out: Path) -> None:
    cost = time_step(training)
    training.after = training.held_out_bits()
    picture.draw(training, out / PICTURE)
    print(report.text(training, cost, out / PICTURE))
    _save(training, out)
