"""The demo's picture: loss, gradient norm and rate, one above the other, over steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from gpt.train import MAX_GRAD_NORM, Training
from nexus import plot

INK, LOSS, RATE, BOUND = "#3e4c59", "#2563a8", "#1f2933", "#d9534a"
DASHED = (0, (4, 4))


def draw(training: Training, path: Path) -> None:
    """Draw the run so far to a PNG of 1200 x 900 pixels, which is written whole or not at all."""
    figure = Figure(figsize=(10, 7.5), dpi=120, layout="constrained")
    above, middle, below = figure.subplots(3, 1, sharex=True, height_ratios=[10, 3, 7])
    _draw_loss(above, training)
    _draw_grad_norm(middle, training)
    _draw_rate(below, training)
    for axes in (above, middle, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, max(1, training.step))
    plot.save(figure, path)


def smoothed(values: list[float], width: int) -> list[float]:
    """Means over centred windows of about `width` values; narrower at the start, where a loss falls fast."""
    means = []
    for i in range(len(values)):
        reach = min(i, width // 2)
        window = values[i - reach : i + reach + 1]
        means.append(math.fsum(window) / len(window))
    return means


def _draw_loss(axes: Axes, training: Training) -> None:
    bits = [nats / math.log(2) for nats in training.losses[: training.step].tolist()]
    axes.plot(bits, color=LOSS, alpha=0.3, linewidth=0.7, label="training, each batch")
    axes.plot(smoothed(bits, max(1, len(bits) // 25)), color=LOSS, linewidth=2, label="training, smoothed")
    if training.before is not None and training.after is not None:
        _draw_ends(axes, (0, training.before), (training.step, training.after))
    for span in plot.spans(training.config.schedule, max(1, training.step))[1:]:
        axes.axvline(span.start, color=INK, alpha=0.4, linewidth=0.8, linestyle=DASHED)
    axes.set_ylabel("loss, bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", edgecolor="none", framealpha=1)
    millions = sum(p.numel() for p in training.model.parameters()) / 1e6
    axes.set_title(f"A GPT of {millions:.2f} million parameters learns {training.corpus.source}", pad=12)


def _draw_ends(axes: Axes, *ends: tuple[int, float]) -> None:
    """The loss on the held-out text, before and after."""
    axes.plot(*zip(*ends, strict=True), "o", color=RATE, markersize=7, label="held-out text", clip_on=False, zorder=5)
    words: dict[str, Any] = {"textcoords": "offset points", "color": INK, "weight": "bold"}
    words["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    for end, offset, side in zip(ends, ((9, 2), (-6, -20)), ("left", "right"), strict=True):
        axes.annotate(f"{end[1]:.2f}", end, offset, horizontalalignment=side, **words)


def _draw_grad_norm(axes: Axes, training: Training) -> None:
    norms = training.grad_norms[: training.step].tolist()
    axes.plot(norms, color=LOSS, linewidth=0.8)
    axes.axhline(MAX_GRAD_NORM, color=BOUND, linewidth=1, linestyle=DASHED, label="max_grad_norm")
    highest = sorted([MAX_GRAD_NORM, *norms])[-1 - len(norms) // 200]  # a few at the start may be far above the rest
    axes.set_ylim(0, 1.1 * highest)
    axes.set_ylabel("gradient norm")
    axes.legend(loc="upper right", edgecolor="none", framealpha=1)


def _draw_rate(axes: Axes, training: Training) -> None:
    schedule = training.config.schedule
    rates = training.rates[: training.step].tolist()
    axes.plot(rates, color=RATE, linewidth=1.8, label="used on the device")
    dots = range(0, len(rates), max(1, len(rates) // 40))
    formula = [schedule(step) for step in dots]
    axes.plot(dots, formula, ".", color=BOUND, markersize=6, label=f"formula of {type(schedule).__name__}")
    axes.set_ylim(0, 1.14 * (max(rates, default=0.0) or 1.0))
    plot.name_phases(axes, schedule, max(1, len(rates)))
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
