"""`python -m nexus plot`: the options that draw a schedule of each kind."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from nexus.arguments import check_count
from nexus.plot import chart, default_steps, draw
from nexus.schedules import (
    WSD,
    WSDS,
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseSqrt,
    Linear,
    MultiStep,
    OneCycle,
    Piecewise,
    Polynomial,
    Schedule,
    StepDecay,
    Tanh,
)
from nexus.schedules.wsd import WSD_DECAYS

KINDS: dict[str, Schedule] = {
    "constant": Constant(lr=1e-3),
    "cosine": Cosine(peak_lr=1e-3, total_steps=10_000, warmup_steps=1000),
    "cyclic": Cyclic(base_lr=1e-4, peak_lr=1e-3, up_steps=1000, mode="triangular2"),
    "exponential": Exponential(peak_lr=1e-3, gamma=0.5, every=1000),
    "inverse-sqrt": InverseSqrt(peak_lr=1e-3, timescale=1000),
    "linear": Linear(start_lr=1e-3, end_lr=1e-5, total_steps=10_000),
    "multi-step": MultiStep(peak_lr=1e-3, milestones=(3000, 6000, 8000), gamma=0.3),
    "one-cycle": OneCycle(peak_lr=1e-3, total_steps=10_000),
    "piecewise": Piecewise(points=((0, 1e-4), (2000, 1e-3), (6000, 5e-4), (10_000, 0.0)), kind="linear"),
    "polynomial": Polynomial(peak_lr=1e-3, total_steps=10_000, power=2.0),
    "sgdr": CosineRestarts(peak_lr=1e-3, cycle_length=1000, cycle_mult=2.0, warmup_steps=500),
    "step-decay": StepDecay(peak_lr=1e-3, gamma=0.5, every=2000),
    "tanh": Tanh(peak_lr=1e-3, total_steps=10_000),
    "wsd": WSD(warmup_steps=1000, stable_steps=7000, decay_steps=2000, peak_lr=1e-3),
    "wsds": WSDS(warmup_steps=1000, cycle_length=3000, decay_steps=600, peak_lr=1e-3),
}
"""What `plot KIND` draws where nothing else is said."""
ALIASES = {"sgdr": ("cosine-restarts",)}
"""The names of the classes, where the command's are others."""
HELP = {
    "base_lr": "the rate between the peaks",
    "cycle_decay": "what each peak is multiplied by for the next",
    "cycle_length": "updates of the first cycle",
    "cycle_mult": "what each cycle is longer by than the last",
    "cycles": "how many, or 'none' for no end",
    "decay_power": "the power of a polynomial decay",
    "decay_steps": "updates of the decay",
    "decay_type": ", ".join(WSD_DECAYS),
    "down_steps": "updates of a fall, or 'none' for as many as of a rise",
    "end_factor": "the last rate, in peaks",
    "end_lr": "the rate after the last update",
    "every": "updates after which the rate is multiplied by gamma",
    "gamma": "what the rate is multiplied by",
    "kind": "the curve between the rates",
    "lower": "the place on the curve at the beginning",
    "lr": "the rate",
    "milestones": "the updates at which the rate falls, as in 30,60,90",
    "min_lr": "the lowest rate",
    "mode": "triangular, triangular2, exp_range",
    "peak_lr": "the highest rate",
    "points": "updates and rates, as in 0:1e-3,100:1e-4",
    "power": "the power of what is left of the way",
    "stable_steps": "updates at the peak, or 'none' for an open end",
    "start_factor": "the first rate, in peaks",
    "start_lr": "the rate of the first update",
    "three_phase": "true: the rate falls to the first one, and then on to the last",
    "timescale": "updates until the rate is the peak divided by the root of 2",
    "total_steps": "updates until the end, the warm-up included",
    "up_fraction": "the share of the updates in which the rate rises",
    "up_steps": "updates of a rise",
    "upper": "the place on the curve at the end",
    "warmup_start_lr": "the rate of the first update of a warm-up, or 'none' for min_lr",
    "warmup_steps": "updates of the linear rise",
}


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _count_or_none(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in text.split(","))


def _points(text: str) -> tuple[tuple[int, float], ...]:
    pairs = [each.split(":") for each in text.split(",")]
    return tuple((int(step), float(rate)) for step, rate in pairs)


# argparse says the names: "invalid int value".
_truth.__name__ = "true or false"
_count_or_none.__name__ = "int"
_number_or_none.__name__ = "float"
_counts.__name__ = "list of ints"
_points.__name__ = "list of int:float"
PARSE: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": _truth,
    "int | None": _count_or_none,
    "float | None": _number_or_none,
    "tuple[int, ...]": _counts,
    "tuple[tuple[int, float], ...]": _points,
}
"""By the types of a schedule's fields."""


def _written(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ",".join(":".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m nexus plot`: for each schedule, its own arguments."""
    kinds = parser.add_subparsers(dest="which", required=True, metavar="{" + ",".join(KINDS) + "}")
    for kind, schedule in KINDS.items():
        name = type(schedule).__name__
        options = kinds.add_parser(
            kind, aliases=ALIASES.get(kind, ()), help=name, description=f"draw {name}", allow_abbrev=False
        )
        options.set_defaults(which=kind)  # also under another name
        for field in fields(schedule):
            options.add_argument(
                "--" + field.name.replace("_", "-"),
                type=PARSE[str(field.type)],
                default=getattr(schedule, field.name),
                help=f"{HELP[field.name]} (default: {_written(getattr(schedule, field.name))})",
            )
        options.add_argument(
            "--steps", type=int, help="updates to draw (default: the whole schedule, and a little more)"
        )
        options.add_argument(
            "-o", "--output", help="the PNG, SVG or PDF to write; by default a chart in the terminal"
        )


def run(args: argparse.Namespace) -> int:
    """Draws what `add_arguments` parsed; returns the exit code."""
    kind: Any = type(KINDS[args.which])
    try:
        schedule = kind(**{field.name: getattr(args, field.name) for field in fields(kind)})
        steps = default_steps(schedule) if args.steps is None else check_count("steps", args.steps, low=2)
        if args.output is not None:
            draw(schedule, args.output, steps)
    except ValueError as error:
        reason = str(error)
    except ImportError as error:
        reason = f"a picture needs matplotlib ({error}): pip install 'nexus-optim[plot]'"
    except OSError as error:
        reason = f"cannot write {args.output!r}: {error.strerror or error}"
    else:
        width = shutil.get_terminal_size().columns
        print(args.output or f"{schedule!r}\n{chart(schedule, steps, width=width, blocks=_prints_blocks())}")
        return 0
    print(f"{args.program}: {reason}", file=sys.stderr)
    return 2


def _prints_blocks() -> bool:
    try:
        "│└─▁█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
