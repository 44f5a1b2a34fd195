"""`python -m nexus demo`: its arguments, and how it ends."""

from __future__ import annotations

import argparse
import importlib
import sys

from nexus.arguments import whole_number
from nexus.demo.errors import INTERRUPTED, REFUSED, DemoError

MAX_STEPS = 10_000_000  # the loss and the rate of every step are kept
MAX_THREADS = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m nexus demo`."""
    add = parser.add_argument
    add("--schedule", choices=("wsd", "sgdr", "cosine"), default="wsd", help="default: %(default)s")
    add("--steps", type=whole_number(1, MAX_STEPS), default=1200, help="updates; default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--out", default="nexus-demo", help="folder of the picture and the checkpoint; default: %(default)s")
    add("--resume", action="store_true", help="go on from the checkpoint that Ctrl-C left in the folder")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="default: %(default)s")
    add(
        "--threads",
        type=whole_number(1, MAX_THREADS),
        help="CPU threads; default: 1, since so small a model gains little by more",
    )


def run(args: argparse.Namespace) -> int:
    """Run what `add_arguments` parsed.

    Returns:
        The exit code: 0; 130 after Ctrl-C; 2 where one line on stderr says what must be mended first.
    """
    try:
        _check_packages()
        from nexus.demo import session

        return session.run(args)
    except DemoError as error:
        print(f"python -m nexus demo: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("\nStopped at once; nothing was written.", file=sys.stderr)
        return INTERRUPTED


def _check_packages() -> None:
    for name in ("matplotlib", "tqdm"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise DemoError(f"the demo needs {name} ({error}): pip install 'nexus-optim[demo]'") from error
