"""Progress on stderr: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from tqdm import tqdm

from nexus.schedules import Schedule

LINES = 10  # in a log
BAR = "{n:,}/{total:,} |{bar}| {remaining}{postfix}"


class Progress:
    """Shows step, loss, rate, phase and speed of a run of `steps` updates that goes on from `step`."""

    def __init__(self, schedule: Schedule, step: int, steps: int, tokens_a_step: int) -> None:
        self.schedule, self.steps, self.tokens_a_step = schedule, steps, tokens_a_step
        self.first, self.started = step, time.perf_counter()
        self.shown = step
        self.bar = (
            tqdm(total=steps, initial=step, bar_format=BAR, dynamic_ncols=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, step: int, loss: float, rate: float) -> None:
        """Show numbers that were just read from the device; `loss` is in nats, and shown in bits per byte."""
        seconds = time.perf_counter() - self.started
        speed = (step - self.first) * self.tokens_a_step / max(seconds, 1e-9)
        phase = self.schedule.phase(step - 1)
        status = f"loss {loss / math.log(2):.2f}, rate {rate:.1e} ({phase}), {speed / 1e3:.1f}k tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(status, refresh=False)
            self.bar.update(step - self.shown)
            self.shown = step
        elif step * LINES // self.steps > self.shown * LINES // self.steps:
            print(f"step {step:,} of {self.steps:,}: {status}", file=sys.stderr, flush=True)
            self.shown = step
