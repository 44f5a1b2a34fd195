"""The demo's arguments, and how it ends."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from gpt import INTERRUPTED, REFUSED, DemoError
from nexus.arguments import Parser, whole_number

MAX_STEPS = 10_000_000  # the loss and the rate of every step are kept
MAX_THREADS = 1024


def main(argv: Sequence[str] | None = None) -> int:
    """Train as the arguments say.

    Returns:
        The exit code: 0; 130 after Ctrl-C; 2 where one line on stderr says what must be mended first.
    """
    description = "Train a small GPT on real text and draw its loss and rate."
    parser = Parser(prog="python examples/gpt", description=description, allow_abbrev=False)
    add = parser.add_argument
    add("--schedule", choices=("wsd", "sgdr", "cosine"), default="wsd", help="default: %(default)s")
    add("--steps", type=whole_number(1, MAX_STEPS), default=1200, help="updates; default: %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    add("--out", default="nexus-demo", help="folder of the picture and the checkpoint; default: %(default)s")
    add("--resume", action="store_true", help="go on from the checkpoint that Ctrl-C left in the folder")
    add("--seed", type=whole_number(0, 2**63 - 1), default=0, help="default: %(default)s")
    threads = "CPU threads; default: 1, since so small a model gains little by more"
    add("--threads", type=whole_number(1, MAX_THREADS), help=threads)
    return parser.run(argv, _run)


def _run(args: argparse.Namespace) -> int:
    try:
        _check_packages()
        from gpt import session

        return session.run(args)
    except DemoError as error:
        print(f"python examples/gpt: {error}", file=sys.stderr)
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
