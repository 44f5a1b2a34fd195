"""Progress on stderr, a bar in a terminal or a line now and then in a log; and Ctrl-C as a request to stop."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

from tqdm import tqdm

from nexus.schedules import Schedule

LINES = 10  # in a log
BAR = "{n:,}/{total:,} |{bar}| {remaining}{postfix}"


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed, to be asked between two steps. A second one stops at once, as usual."""
    usual = signal.getsignal(signal.SIGINT)
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def progress(
    schedule: Schedule, first: int, steps: int, bytes_a_step: int
) -> Iterator[Callable[[int, float, float], None]]:
    """Yields a function of step, loss (nats a byte) and rate that shows them, with phase and speed.

    `first` is the step that the run goes on from.
    """
    in_log = not sys.stderr.isatty()
    started, shown = time.perf_counter(), first

    def show(step: int, loss: float, rate: float) -> None:
        nonlocal shown
        if in_log and step * LINES // steps == shown * LINES // steps:
            return
        speed = (step - first) * bytes_a_step / max(time.perf_counter() - started, 1e-9)
        phase = schedule.phase(step - 1)
        status = f"loss {loss / math.log(2):.2f}, rate {rate:.1e} ({phase}), {speed / 1e3:.1f}k tokens/s"
        if in_log:
            print(f"step {step:,} of {steps:,}: {status}", file=sys.stderr, flush=True)
        bar.set_postfix_str(status, refresh=False)
        bar.update(step - shown)
        shown = step

    look = {"bar_format": BAR, "dynamic_ncols": True, "file": sys.stderr, "disable": in_log}
    with tqdm(total=steps, initial=first, **look) as bar:
        yield show
