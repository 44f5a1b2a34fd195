"""`python -m benchmarks.front_page ROWS.json PICTURE`: the README's picture, of speed, memory and a moving rate."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.cases import CLIP_STEP_SCHEDULE, FUSED
from benchmarks.picture import INK
from nexus.optim import FusedAdamW
from nexus.optim.storage import bytes_table
from nexus.plot import save
from nexus.schedules import WSD

BLUE = "#2563a8"
STEPS, EDITS = 1000, {450: "begin_decay", 650: "rewarm"}


def draw(rows: list[dict[str, Any]], cpu: str, path: Path) -> None:
    """Draw the rows that compare clipping, step and schedule with torch's fused AdamW, one of each case."""
    figure = Figure(figsize=(15, 4), dpi=120, layout="constrained")
    speed, memory, rate = figure.subplots(1, 3, width_ratios=[4, 4, 5])
    _draw_speed(speed, rows, cpu)
    _draw_memory(memory)
    _draw_rate(rate)
    for axes in (speed, memory, rate):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    save(figure, path)


def _draw_speed(axes: Any, rows: list[dict[str, Any]], cpu: str) -> None:
    ratios = {
        row["title"]: row["ratio"]["median"]
        for row in rows
        if (row["job"], row["peer"]) == (CLIP_STEP_SCHEDULE, FUSED)
    }
    bars = axes.barh([title.partition(", ")[0] for title in ratios], ratios.values(), color=BLUE)
    axes.bar_label(bars, [f" {ratio:.2g}x" for ratio in ratios.values()], color=INK)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.8, 2 * max(ratios.values()))
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_title(
        f"times as fast as torch's fused AdamW,\nclip_grad_norm_ and LambdaLR ({cpu}, 2 cores)", fontsize=10
    )


def _draw_memory(axes: Any) -> None:
    modes = [(name, resident) for name, resident, _ in bytes_table()]
    bars = axes.barh([name for name, _ in modes], [size for _, size in modes], color=BLUE)
    axes.bar_label(bars, [f" {size:.2f}".removesuffix(".00") for _, size in modes], color=INK)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xticks([0, 5, 10, 15])
    axes.set_title("bytes a parameter,\nwith its gradient and its state", fontsize=10)


def _draw_rate(axes: Any) -> None:
    schedule = WSD(warmup_steps=100, stable_steps=None, decay_steps=200, peak_lr=1e-3, min_lr=1e-4)
    weight = torch.ones(4, requires_grad=True)
    optimizer = FusedAdamW([weight], lr=schedule)
    history = optimizer.history(capacity=STEPS)
    weight.grad = torch.ones(4)
    for step in range(STEPS):
        if step in EDITS:
            getattr(optimizer, EDITS[step])(*([150] if EDITS[step] == "rewarm" else []))
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (4, 4)))
            axes.text(
                step - 10, 5e-4, f"{EDITS[step]}()", fontsize=9, color=INK, rotation=90, ha="right", va="center"
            )
        optimizer.step()
    axes.plot(history.read().lr.flatten().tolist(), color=BLUE, linewidth=2)
    axes.set_ylim(0, 1.1e-3)
    axes.set_yticks([0, 5e-4, 1e-3], ["0", "0.0005", "0.001"])
    axes.set_xlabel("update", color=INK)
    axes.set_title("learning rate, computed on the device;\nthe schedule edited while the run goes on", fontsize=10)


def main() -> None:
    """Draw what the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    results = json.loads(args.rows.read_text("utf-8"))
    draw(results["rows"], results["metadata"]["cpu"], args.picture)


if __name__ == "__main__":
    main()
