"""Another process that keeps a core busy, as those that load data do."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

_SPIN = """
import os, sys, threading

def end():
    sys.stdin.read()  # returns once the benchmark has ended, however it has
    os._exit(0)

if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(sys.argv[1])})
threading.Thread(target=end).start()
print(flush=True)
while True:
    pass
"""


@contextlib.contextmanager
def busy_core() -> Iterator[int]:
    """Keep one core busy, the last that this process may use. Only Linux keeps the other process on it."""
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    command = [sys.executable, "-S", "-c", _SPIN, str(core)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it has begun
            yield core
        finally:
            process.kill()
