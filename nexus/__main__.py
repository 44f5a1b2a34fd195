"""The command line: `nexus info | plot`, or `python -m nexus`.

Each command is a module with `run(args) -> int` and, if it has options, `add_arguments(parser)`.
Only the module of the command at hand is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from nexus import __version__
from nexus.arguments import Parser

COMMANDS = {
    "info": ("nexus.info", "print versions, backends (or why one is missing) and threads"),
    "plot": ("nexus.plot_command", "draw a learning-rate schedule"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    program = "nexus" if Path(sys.argv[0]).name == "nexus" else "python -m nexus"
    parser = Parser(prog=program, description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        command.set_defaults(program=command.prog)
        if name == wanted:
            chosen = import_module(module)
            if hasattr(chosen, "add_arguments"):
                chosen.add_arguments(command)
    return parser.run(argv, lambda args: chosen.run(args))


if __name__ == "__main__":
    sys.exit(main())
