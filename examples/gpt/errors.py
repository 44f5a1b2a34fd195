"""How the demo ends when it does not end well."""

from __future__ import annotations

REFUSED, INTERRUPTED = 2, 130  # exit codes; the latter is the shell's for Ctrl-C


class DemoError(Exception):
    """Something that the user can mend: one line with the cause and the remedy."""
