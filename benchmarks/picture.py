"""The speed-ups as horizontal bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from benchmarks import cases
from benchmarks.cases import CPU, CUDA, TRAINING_CASES
from benchmarks.report import Row, Spread
from benchmarks.table import conditions
from nexus.plot import save

COLORS = {
    cases.FUSED: "#2563a8",
    cases.CAPTURABLE: "#4b8fd1",
    cases.FOREACH: "#7fb2dd",
    cases.FOR_LOOP: "#c9d3dc",
    cases.OPTIMI: "#c98a2b",
    cases.TORCHAO: "#d9b36c",
    cases.APEX: "#6a9f58",
    cases.NEXUS_TRITON: "#9b8ec4",
    cases.TORCH_LOOP: "#2563a8",
    cases.TORCH_FUSED_LOOP: "#7fb2dd",
    cases.TORCH_GRAPH: "#c98a2b",
    cases.NEXUS_EAGER: "#9b8ec4",
}
AS_OPTIMIZERS = (cases.FUSED, cases.CAPTURABLE, cases.FOREACH, cases.FOR_LOOP)
LABELS = {
    **{name: f"torch.optim.AdamW, {name}" for name in AS_OPTIMIZERS},
    cases.TORCH_LOOP: "torch loop: AdamW, foreach; clip_grad_norm_; LambdaLR",
    cases.TORCH_FUSED_LOOP: "the same, fused",
}
DEVICE, HOST = "time of the device", "time of the host"
PANELS = {  # what is drawn side by side: a field of a row by its title, of steps and of whole training steps
    (CPU, False): {"": "time"},
    (CPU, True): {"": "time"},
    (CUDA, False): {DEVICE: "time", f"{HOST}, step by step": "host", f"{HOST}, replaying a graph": "replay_host"},
    (CUDA, True): {"steps a second": "loop", DEVICE: "time", HOST: "host"},
}
INK = "#3e4c59"
BAR = 0.8  # of the space between two bars


def draw(rows: list[Row], data: dict[str, Any], path: Path) -> None:
    """Draw how many times as fast nexus is to a PNG, which is written whole or not at all.

    Args:
        rows: of one device, all of steps or all of training; at least one compares with a peer.
        data: the metadata of the run.
        path: of the PNG.
    """
    rows = [row for row in rows if row.peer in COLORS]
    heights, ticks = _places(rows)
    panels = PANELS[rows[0].device, rows[0].case in TRAINING_CASES]
    figure = Figure(figsize=(6 + 4 * len(panels), 1.8 + 0.3 * (heights[-1] + 1)), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, field) in zip(all_axes, panels.items(), strict=True):
        comparisons = [getattr(row, field) for row in rows]
        _draw_bars(axes, rows, heights, [times.ratio if times else None for times in comparisons])
        axes.set_title(title, loc="left", color=INK)
    all_axes[0].set_yticks([y for y, _ in ticks], [label for _, label in ticks], color=INK)
    all_axes[0].set_ylim(heights[-1] + 0.8, -0.8)
    used = [name for name in COLORS if any(row.peer == name for row in rows)]
    patches = [Patch(color=COLORS[name], label=LABELS.get(name, name)) for name in used]
    figure.legend(handles=patches, frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(_title(data), x=0.01, horizontalalignment="left", color=INK)
    save(figure, path)


def _draw_bars(axes: Any, rows: list[Row], heights: list[float], ratios: list[Spread | None]) -> None:
    drawn = [ratio for ratio in ratios if ratio is not None]
    for row, y, ratio in zip(rows, heights, ratios, strict=True):
        if ratio is None:
            continue
        axes.barh(y, ratio.median - 1, left=1, height=BAR, color=COLORS[row.peer], linewidth=0)
        axes.plot([ratio.p20, ratio.p80], [y, y], color=INK, linewidth=1.5, solid_capstyle="butt")
        for end in (ratio.p20, ratio.p80):
            axes.plot([end, end], [y - 0.2, y + 0.2], color=INK, linewidth=1.5)
        axes.annotate(
            f"{ratio.median:.3g}×",
            (max(ratio.p80, ratio.median, 1.0), y),
            (5, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=INK,
            weight="bold" if row.peer in (cases.FUSED, cases.TORCH_LOOP) else "normal",
        )
    axes.set_xscale("log")
    low = min([0.9, *(ratio.p20 * 0.95 for ratio in drawn)])
    high = max([2.0, *(ratio.p80 * 1.5 for ratio in drawn)])
    axes.set_xlim(low, high)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    marks = [mark for power in range(-3, 7) for step in steps if low <= (mark := step * 10.0**power) <= high]
    axes.set_xticks(marks, [f"{mark:g}×" for mark in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axvline(1, color=INK, linewidth=1)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


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


def _title(data: dict[str, Any]) -> str:
    day = data["date"].partition("T")[0]
    return (
        "How many times as fast is nexus?\n"
        "Medians and 20th to 80th percentiles of pairs timed in turns.\n"
        f"{conditions(data)}, torch {data['torch']}, {day}"
    )
