"""The command line: `python -m nexus info | demo | plot | bench`.

Each command is a module with `run(args) -> int` and, if it has options, `add_arguments(parser)`.
Only the module of the command at hand is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from nexus import __version__

COMMANDS = {
    "info": ("nexus.info", "print versions, backends (or why one is missing) and threads"),
    "demo": ("nexus.demo.cli", "train a small GPT on real text and draw its loss and rate"),
    "plot": ("nexus.plot", "draw a learning-rate schedule"),
    "bench": ("nexus.bench.cli", "time the optimizer beside torch's"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers nonsense with one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists what is allowed)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="python -m nexus", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == wanted:
            chosen = import_module(module)
            if hasattr(chosen, "add_arguments"):
                chosen.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        code: int = chosen.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader went away, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
