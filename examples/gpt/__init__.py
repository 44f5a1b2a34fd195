"""The demo: a small GPT learns to write Python in two minutes, its learning rate computed by the optimizer.

The way through it: `cli` (arguments) → `session` (from the arguments to the exit code) → `run` (what identifies a
run) → `corpus` and `model` → `train` (the loop), with `progress` and `checkpoint` → `report` and `picture` (the end).
"""

REFUSED, INTERRUPTED = 2, 130  # exit codes; the latter is the shell's for Ctrl-C


class DemoError(Exception):
    """Something that the user can mend: one line with the cause and the remedy."""
