"""The speed-ups as horizontal bars."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from nexus.bench.cases import FOR_LOOP, FOREACH, FUSED
from nexus.bench.measure import Row
from nexus.bench.report import threads

COLORS = {FUSED: "#2563a8", FOREACH: "#7fb2dd", FOR_LOOP: "#c9d3dc"}
INK = "#3e4c59"
BAR = 0.8  # of the space between two bars


def draw(rows: list[Row], data: dict[str, Any], path: Path) -> None:
    """Draw the rows that compare with torch to a PNG, which is written whole or not at all.

    Args:
        rows: at least one that compares with torch.
        data: the metadata of the run.
        path: of the PNG.
    """
    rows = [row for row in rows if row.peer in COLORS]
    heights, ticks = _places(rows)
    figure = Figure(figsize=(10, 1.6 + 0.3 * (heights[-1] + 1)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, y in zip(rows, heights, strict=True):
        axes.barh(y, row.ratio.median - 1, left=1, height=BAR, color=COLORS[row.peer], linewidth=0)
        axes.plot([row.ratio.p20, row.ratio.p80], [y, y], color=INK, linewidth=1.5, solid_capstyle="butt")
        for end in (row.ratio.p20, row.ratio.p80):
            axes.plot([end, end], [y - 0.2, y + 0.2], color=INK, linewidth=1.5)
        right = max(row.ratio.p80, row.ratio.median, 1.0)
        axes.annotate(
            f"{row.ratio.median:.3g}×",
            (right, y),
            (5, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=INK,
            weight="bold" if row.peer == FUSED else "normal",
        )
    axes.set_xscale("log")
    low = min(0.9, *(row.ratio.p20 * 0.95 for row in rows))
    high = max(2.0, *(row.ratio.p80 * 1.5 for row in rows))
    axes.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    marks = [mark for power in range(-2, 7) for step in steps if low <= (mark := step * 10.0**power) <= high]
    axes.set_xticks(marks, [f"{mark:g}×" for mark in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks([y for y, _ in ticks], [label for _, label in ticks], color=INK)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(heights[-1] + 0.8, -0.8)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    used = [name for name in COLORS if any(row.peer == name for row in rows)]
    patches = [axes.barh(0, 0, color=COLORS[name], label=f"torch.optim.AdamW, {name}") for name in used]
    axes.legend(handles=patches, frameon=False, loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=3)
    axes.set_title("How many times as fast as torch.optim.AdamW is nexus?", loc="left", pad=42, weight="bold")
    axes.annotate(_conditions(data), (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=INK)
    _save(figure, path)


def _places(rows: list[Row]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each bar is, and where the name of each job is: bars of one job together, of one case close."""
    heights: list[float] = []
    jobs: dict[tuple[str, str], list[float]] = {}
    y = -1.0
    for before, row in zip([None, *rows], rows, strict=False):
        y += 1.0
        if before is not None and (before.case, before.job) != (row.case, row.job):
            y += 0.5 if before.case == row.case else 1.2
        heights.append(y)
        jobs.setdefault((row.title, row.job), []).append(y)
    return heights, [(sum(at) / len(at), f"{title}\n{job}") for (title, job), at in jobs.items()]


def _conditions(data: dict[str, Any]) -> str:
    day = data["date"].partition("T")[0]
    return (
        "Medians and 20th to 80th percentiles of pairs timed in turns.\n"
        f"{data['cpu']}, {threads(data)}, torch {data['torch']}, {day}"
    )


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
