"""Pictures of a schedule: a PNG, SVG or PDF by matplotlib, or a small chart in the terminal."""

from __future__ import annotations

import itertools
import math
import os
import textwrap
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nexus.arguments import MAX_STEP, check_count
from nexus.files import write_whole
from nexus.schedules import WSD, CosineRestarts, Schedule
from nexus.schedules.base import layers_of
from nexus.schedules.clock import Clocked
from nexus.schedules.curves import NEVER, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nexus.training.range_test import RangeTest

MAX_CYCLES = 12  # more are drawn as one phase
MAX_POINTS = 4000
TITLE_COLUMNS = 105
TITLE_LINES = 3
MAX_RATE = 1e300  # a higher one, of growth without end, is drawn as this
COLORS = {
    "warmup": "#f2b134",
    "up": "#f2b134",
    "stable": "#4a90d9",
    "decay": "#d9534a",
    "down": "#d9534a",
    "cooldown": "#d9534a",
    "annihilation": "#9b6fb0",
    "done": "#9a9a9a",
}
FORMATS = {".png": "Software", ".svg": "Date", ".pdf": "CreationDate"}
"""Suffixes of a picture's path, each with the metadata that would make two pictures of one schedule differ."""
CYCLE_COLORS = ("#4a90d9", "#7bc8a4")


class Span(NamedTuple):
    """A named stretch of updates, from `start` to `stop - 1`."""

    name: str
    start: int
    stop: int


def default_steps(schedule: Schedule) -> int:
    """How many updates show all of a schedule that ends, or the first four cycles of one that does not.

    Of one without cycles, as many as bring the rate nine tenths of the way to where it goes.
    """
    if isinstance(schedule, CosineRestarts):
        step = schedule.warmup_steps
        for _ in range(4):
            step += schedule.cycle(min(step, MAX_STEP))[2]
        return min(step, MAX_STEP)
    if isinstance(schedule, WSD) and schedule.stable_steps is None:
        return min(4 * (schedule.warmup_steps + schedule.decay_steps), MAX_STEP)
    if schedule.length is not None:
        end = schedule.length
        return min(end + max(1, end // 20), MAX_STEP) if end else 1000
    layers = layers_of(schedule)
    shown = [layer.repeat_start + 4 * layer.repeat_length for layer in layers if layer.repeat_start < NEVER]
    starts = [row.start for layer in layers for row in layer.segments if row.start <= MAX_STEP]
    return min(max(shown, default=max(starts) + _reach(schedule, max(starts))), MAX_STEP)


def _reach(schedule: Schedule, start: int) -> int:
    """The updates after `start`, a power of two, in which the rate comes near to what it is in the end."""
    first, last = schedule(start), schedule(MAX_STEP)
    if last > MAX_RATE or first == last:
        return 1000
    after = 2
    while start + after < MAX_STEP and abs(schedule(start + after) - last) > 0.1 * abs(first - last):
        after *= 2
    return after


def spans(schedule: Schedule, steps: int) -> list[Span]:
    """The phases in the first `steps` updates; of warm restarts, each cycle, if they are few."""
    if not isinstance(schedule, CosineRestarts):
        layers = layers_of(schedule)
        many = (layer.repeat_start for layer in layers if len(_repeats(layer, steps)) > MAX_CYCLES)
        end = min(many, default=steps)  # from there on, one span
        edges = sorted({start for layer in layers for start in _starts(layer, end)} | {end})
        named = [Span(schedule.phase(a), a, b) for a, b in itertools.pairwise(edges)]
        return _merged([*named, Span("cycles", end, steps)] if end < steps else named)
    found: list[Span] = []
    start = 0
    while start < steps:
        index, _, length = schedule.cycle(start)
        if index == MAX_CYCLES:
            return [*found[:-MAX_CYCLES], Span("cosine", schedule.warmup_steps, steps)]
        found.append(Span("warmup" if index < 0 else f"cycle {index}", start, min(start + length, steps)))
        start = found[-1].stop
    return found


def _repeats(layer: Layer, steps: int) -> range:
    """The steps, below `steps`, from which the layer does its repeated rows again."""
    return range(layer.repeat_start, steps, layer.repeat_length)


def _starts(layer: Layer, steps: int) -> set[int]:
    """The steps, below `steps`, at which a row of the layer begins, or begins again."""
    starts = {row.start for row in layer.segments}
    again = _repeats(layer, steps)
    repeated = {later + start - layer.repeat_start for start in starts if start >= again.start for later in again}
    return {start for start in starts | repeated if start < steps}


def _merged(found: list[Span]) -> list[Span]:
    """The spans, those of one name that follow each other as one."""
    groups = (list(group) for _, group in itertools.groupby(found, key=lambda span: span.name))
    return [Span(group[0].name, group[0].start, group[-1].stop) for group in groups]


def sample(schedule: Schedule, steps: int) -> list[int]:
    """The updates to draw: all if they are few, else evenly spread ones and both sides of every jump."""
    if steps <= MAX_POINTS:
        return list(range(steps))
    points = {i * (steps - 1) // (MAX_POINTS - 1) for i in range(MAX_POINTS)}
    for span in spans(schedule, steps):
        points |= {span.start, max(0, span.start - 1)}
    return sorted(points)


def chart(schedule: Schedule, steps: int, *, width: int = 80, height: int = 10, blocks: bool = True) -> str:
    """The first `steps` updates as text, `width` columns wide; `blocks=False` keeps to ASCII.

    >>> schedule = WSD(warmup_steps=8, stable_steps=8, decay_steps=8, peak_lr=0.5)
    >>> print(chart(schedule, 24, width=36, height=3, blocks=False))
           0.5 |       ###########
               |    #################
             0 |  #####################
               +------------------------
                warmup  |stable |decay
                0                     23
    """
    levels = " ▁▂▃▄▅▆▇█" if blocks else " #"
    side, corner, bottom = "│└─" if blocks else "|+-"
    wide = max(24, width - 10 - len(" |"))  # room for two step numbers
    rates = [min(schedule((2 * column + 1) * steps // (2 * wide)), MAX_RATE) for column in range(wide)]
    phases = spans(schedule, steps)
    top = max(*rates, *(min(schedule(phase.start), MAX_RATE) for phase in phases)) or 1.0
    filled = [round(rate / top * height * (len(levels) - 1)) for rate in rates]
    lines = []
    for row in reversed(range(height)):
        label = f"{top:.4g}" if row == height - 1 else "0" if row == 0 else ""
        cells = (max(0, min(level - row * (len(levels) - 1), len(levels) - 1)) for level in filled)
        lines.append(f"{label:>10} {side}" + "".join(levels[cell] for cell in cells))
    lines.append(" " * 11 + corner + bottom * wide)
    names = [" "] * wide
    for phase in phases:
        a, b = phase.start * wide // steps, phase.stop * wide // steps
        edge = side if phase.start else ""
        fits = len(edge + phase.name) <= b - a
        names[a:b] = (edge + phase.name * fits)[: b - a].ljust(b - a)
    last = f"{steps - 1:,}"
    lines += [" " * 12 + "".join(names), " " * 12 + "0" + last.rjust(wide - 1)]
    return "\n".join(line.rstrip() for line in lines)


def draw(schedule: Schedule, path: str | os.PathLike[str], steps: int | None = None) -> None:
    """Draws the first `steps` updates to a PNG of 1200 x 540 pixels, or to an SVG or PDF.

    Args:
        schedule: what to draw.
        path: the picture, whose suffix says its format; it is written whole or not at all.
        steps: how many updates; by default as many as show the whole schedule.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: `path` cannot be written.
        ValueError: `path` ends in another suffix.
    """
    path = checked_path(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps = default_steps(schedule) if steps is None else check_count("steps", steps, low=2)
    points = sample(schedule, steps)
    rates = [min(schedule(step), MAX_RATE) for step in points]
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(points, rates, color="#1f2933", linewidth=1.8, solid_joinstyle="round")
    axes.set_xlim(0, max(1, steps - 1))
    axes.set_ylim(0, 1.14 * (max(rates) or 1.0))
    name_phases(axes, schedule, steps)
    axes.set_title(title(schedule), fontsize=10, pad=10)
    axes.set_xlabel("count of the clock" if isinstance(schedule, Clocked) else "completed updates t")
    axes.set_ylabel("learning rate")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_range_test(test: RangeTest, path: str | os.PathLike[str]) -> None:
    """Draws the losses of a range test over its rates, to a PNG of 1200 x 540 pixels, or to an SVG or PDF.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: `path` cannot be written.
        ValueError: `path` ends in another suffix.
    """
    path = checked_path(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(test.rates, test.losses, color="#4a90d9", alpha=0.5, linewidth=1.0, label="loss")
    axes.plot(test.rates, test.smoothed, color="#1f2933", linewidth=1.8, label="smoothed")
    if test.suggestion is not None:
        axes.axvline(test.suggestion, color="#d9534a", linewidth=1.2, label=f"suggestion: {test.suggestion:.2g}")
    shown = [loss for loss in test.smoothed if math.isfinite(loss)]
    if shown:
        least = min(loss for loss in (*shown, *test.losses) if math.isfinite(loss))
        room = 0.1 * (max(shown) - least) or 1.0
        axes.set_ylim(least - room, max(shown) + 4 * room)  # the last losses are often far above
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def title(schedule: Schedule) -> str:
    """The schedule's repr in lines that fit a picture; of a longer one, as of a table, the beginning.

    >>> print(title(WSD(warmup_steps=8, stable_steps=None, decay_steps=8, peak_lr=0.5)))
    WSD(warmup_steps=8, stable_steps=None, decay_steps=8, peak_lr=0.5, min_lr=0.0, decay_type='linear',
    decay_power=2.0, warmup_start_lr=None)
    """
    code = repr(schedule)[: TITLE_LINES * TITLE_COLUMNS + 1]
    return textwrap.fill(code, TITLE_COLUMNS, max_lines=TITLE_LINES, placeholder=" …", break_on_hyphens=False)


def name_phases(axes: Axes, schedule: Schedule, steps: int) -> None:
    """Colors the background of each phase of the first `steps` updates, and writes its name at the top."""
    for number, span in enumerate(spans(schedule, steps)):
        color = COLORS.get(span.name, CYCLE_COLORS[number % 2])
        axes.axvspan(span.start, span.stop, color=color, alpha=0.16, linewidth=0)
        share = (span.stop - span.start) / steps
        if share > 0.015:
            axes.text(
                (span.start + span.stop) / 2,
                0.975,
                span.name,
                rotation=0 if share > 0.0105 * len(span.name) else 90,
                transform=axes.get_xaxis_transform(),
                horizontalalignment="center",
                verticalalignment="top",
                color="#3e4c59",
            )


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Where a picture can go: its suffix says the format."""
    checked = Path(path)
    if checked.suffix.lower() not in FORMATS:
        raise ValueError(f"a picture's path must end in {', '.join(FORMATS)}, got {str(path)!r}")
    return checked


def save(figure: Figure, path: Path) -> None:
    """Writes a picture, whole or not at all; the same figure gives the same bytes."""
    from matplotlib import rc_context

    suffix = checked_path(path).suffix.lower()
    with rc_context({"svg.hashsalt": "nexus"}):
        write_whole(path, partial(figure.savefig, format=suffix[1:], metadata={FORMATS[suffix]: None}))
