"""The demo's picture: loss above, gradient norm and rate below, over steps."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from gpt.train import MAX_GRAD_NORM, Training
from nexus.plot import COLORS, CYCLE_COLORS, spans

INK, LOSS, RATE = "#3e4c59", "#2563a8", "#1f2933"


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
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def smoothed(values: list[float], width: int) -> list[float]:
    """Means over centred windows of about `width` values; narrower at the start, where a loss falls fast."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for i in range(len(values)):
        reach = min(i, width // 2)
        first, stop = i - reach, min(i + reach + 1, len(values))
        means.append((sums[stop] - sums[first]) / (stop - first))
    return means


def _draw_loss(axes: Axes, training: Training) -> None:
    bits = [nats / math.log(2) for nats in training.losses[: training.step].tolist()]
    steps = range(len(bits))
    axes.plot(steps, bits, color=LOSS, alpha=0.3, linewidth=0.7, label="training, each batch")
    axes.plot(steps, smoothed(bits, max(1, len(bits) // 25)), color=LOSS, linewidth=2, label="training, smoothed")
    if training.before is not None and training.after is not None:
        ends = [(0, training.before, (9, 2)), (training.step, training.after, (-6, -20))]
        axes.plot(
            [0, training.step],
            [training.before, training.after],
            "o",
            color=RATE,
            markersize=7,
            label="held-out text",
            clip_on=False,
            zorder=5,
        )
        for step, value, (right, down) in ends:
            axes.annotate(
                f"{value:.2f}",
                (step, value),
                (right, down),
                textcoords="offset points",
                horizontalalignment="left" if right > 0 else "right",
                color=INK,
                weight="bold",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
    for span in spans(training.config.schedule, max(1, training.step))[1:]:
        axes.axvline(span.start, color=INK, alpha=0.4, linewidth=0.8, linestyle=(0, (4, 4)))
    axes.set_ylabel("loss, bits per byte")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", edgecolor="none", framealpha=1)
    millions = sum(p.numel() for p in training.model.parameters()) / 1e6
    axes.set_title(f"A GPT of {millions:.2f} million parameters learns {training.corpus.source}", pad=12)


def _draw_grad_norm(axes: Axes, training: Training) -> None:
    norms = training.grad_norms[: training.step].tolist()
    axes.plot(range(len(norms)), norms, color=LOSS, linewidth=0.8)
    axes.axhline(MAX_GRAD_NORM, color="#d9534a", linewidth=1, linestyle=(0, (4, 4)), label="max_grad_norm")
    highest = sorted([MAX_GRAD_NORM, *norms])[-1 - len(norms) // 200]  # a few at the start may be far above the rest
    axes.set_ylim(0, 1.1 * highest)
    axes.set_ylabel("gradient norm")
    axes.legend(loc="upper right", edgecolor="none", framealpha=1)


def _draw_rate(axes: Axes, training: Training) -> None:
    schedule = training.config.schedule
    rates = training.rates[: training.step].tolist()
    axes.plot(range(len(rates)), rates, color=RATE, linewidth=1.8, label="used on the device")
    dots = range(0, len(rates), max(1, len(rates) // 40))
    formula = [schedule(step) for step in dots]
    axes.plot(dots, formula, ".", color="#d9534a", markersize=6, label=f"formula of {type(schedule).__name__}")
    axes.set_ylim(0, 1.14 * (max(rates, default=0.0) or 1.0))
    for number, span in enumerate(spans(schedule, max(1, len(rates)))):
        color = COLORS.get(span.name, CYCLE_COLORS[number % 2])
        axes.axvspan(span.start, span.stop, color=color, alpha=0.16, linewidth=0)
        share = (span.stop - span.start) / max(1, len(rates))
        if share > 0.015:
            axes.text(
                (span.start + span.stop) / 2,
                0.975,
                span.name,
                rotation=0 if share > 0.012 * len(span.name) else 90,
                transform=axes.get_xaxis_transform(),
                horizontalalignment="center",
                verticalalignment="top",
                color=INK,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2)
