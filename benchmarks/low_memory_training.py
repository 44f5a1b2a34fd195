"""Train the demo's GPT in each way of storing its state, and compare the losses on text that it has not seen.

    python benchmarks/low_memory_training.py ROWS.jsonl [--steps N] [--context N] [--peak-lr X] [--picture PNG]

One row of ROWS.jsonl is one run. Rows that are there are not computed again, so that a stopped call may be repeated.
Runs of one seed begin with the same weights and see the same batches in every mode. A model in bfloat16 computes in
bfloat16; its loss on the held-out text is computed in float32, from the weights as they are.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.report import commit, cpu_name, now
from nexus.optim import FusedAdamW
from nexus.optim.storage import MODES
from nexus.plot import save

# isort: split
# Found by `import benchmarks`, which comes first.
from gpt import corpus
from gpt.corpus import Corpus
from gpt.model import GPT, GPTConfig
from gpt.picture import smoothed
from gpt.run import Size, schedule_for
from gpt.train import BETAS, MAX_GRAD_NORM, parameter_groups

BASELINE, CONTROL = "float32", "bfloat16"  # modes; the second loses what is below half a last place
BATCH = Size().batch
HELD_OUT_WINDOWS = Size().held_out_windows
EACH = 20  # training losses in one number of a row
SMOOTHED = 10  # numbers in one point of the picture
COLORS = ("#1f2933", "#2563a8", "#7fb2dd", "#d9534a", "#6a9f58", "#a3c79a", "#9b8ec4", "#c98a2b")  # of MODES


def bits_a_byte(model: GPT, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss; the softmax is in float32, as it is everywhere."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten()) / math.log(2)


def train(mode: str, seed: int, text: Corpus, *, steps: int, context: int, peak_lr: float) -> dict[str, Any]:
    """One run: what the model has learnt, and its training losses in bits a byte."""
    _, dtype, options = next(each for each in MODES if each[0] == mode)
    torch.manual_seed(seed)
    model = GPT(GPTConfig(context=context)).to(dtype)
    schedule = schedule_for("wsd", steps, peak_lr)
    optimizer = FusedAdamW(
        parameter_groups(model), lr=schedule, betas=BETAS, max_grad_norm=MAX_GRAD_NORM, seed=seed, **options
    )
    losses, began = [], time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        loss = bits_a_byte(model, text.batch(seed, step, BATCH, context))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    with torch.no_grad():
        as_it_is = copy.deepcopy(model).float()
        batches = text.held_out_batches(HELD_OUT_WINDOWS, 32, context)
        held_out = statistics.fmean(float(bits_a_byte(as_it_is, batch)) for batch in batches)
    return {
        "mode": mode,
        "seed": seed,
        "steps": steps,
        "context": context,
        "peak_lr": peak_lr,
        "parameters": sum(param.numel() for param in model.parameters()),
        "bytes_per_parameter": optimizer.bytes_per_parameter(),
        "held_out_bits": held_out,
        "losses": [round(statistics.fmean(losses[i : i + EACH]), 5) for i in range(0, steps, EACH)],
        "seconds": round(seconds, 1),
    }


def by_mode(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Mapping[str, Any]]]:
    """The rows of each mode, by their seeds."""
    modes = {name: {row["seed"]: row for row in rows if row["mode"] == name} for name, _, _ in MODES}
    return {name: found for name, found in modes.items() if found}


def summary(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float, float]]:
    """(mode, mean bits a byte on the held-out text, above float32, the same in deviations of float32's seeds)."""
    losses = {name: [row["held_out_bits"] for row in runs.values()] for name, runs in by_mode(rows).items()}
    mean, deviation = statistics.fmean(losses[BASELINE]), statistics.stdev(losses[BASELINE])
    means = {name: statistics.fmean(each) for name, each in losses.items()}
    return [(name, each, each - mean, (each - mean) / deviation) for name, each in means.items()]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The training losses, and how far each is above float32's of the same seed, which saw the same batches."""
    modes = by_mode(rows)
    colors = {name: color for (name, _, _), color in zip(MODES, COLORS, strict=True)}
    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])
    deviation = statistics.stdev(row["held_out_bits"] for row in modes[BASELINE].values())
    below.axhspan(-2 * deviation, 2 * deviation, color="#e4e7eb", label="two deviations of float32's seeds")
    for name, runs in modes.items():
        places = range(EACH, runs[0]["steps"] + 1, EACH)
        losses = [statistics.fmean(each) for each in zip(*(run["losses"] for run in runs.values()), strict=True)]
        pairs = [(run["losses"], modes[BASELINE][seed]["losses"]) for seed, run in runs.items()]
        differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
        difference = [statistics.fmean(each) for each in zip(*differences, strict=True)]
        above.plot(places, smoothed(losses, SMOOTHED), color=colors[name], linewidth=1.2)
        below.plot(places, smoothed(difference, SMOOTHED), color=colors[name], linewidth=1.5, label=name)
    above.set_ylabel("training loss, bits per byte")
    below.set_ylabel("above float32 with the same seed")
    below.set_xlabel("step")
    below.set_ylim(-0.02, 0.1)
    below.legend(frameon=False, loc="upper left", ncols=2)
    row = next(iter(modes[BASELINE].values()))
    above.set_title(f"A GPT of {row['parameters']:,} parameters, means of {len(modes[BASELINE])} seeds", loc="left")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="a file of JSON lines, added to")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--context", type=int, default=GPTConfig().context, help="bytes in a text of a batch")
    parser.add_argument("--peak-lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--mode", action="append", choices=[name for name, _, _ in MODES], help="default: all")
    parser.add_argument("--picture", type=Path, help="a PNG of the curves")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # so small a model gains little by more
    made_by = {"commit": commit(), "torch": torch.__version__, "cpu": cpu_name()}
    run = {"steps": args.steps, "context": args.context, "peak_lr": args.peak_lr}
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()] if args.rows.exists() else []
    rows = [row for row in rows if run.items() <= row.items()]
    there = {(row["mode"], row["seed"]) for row in rows}
    text = corpus.load(torch.device("cpu"))
    for seed in range(args.seeds):
        for mode in args.mode or [name for name, _, _ in MODES]:
            if (mode, seed) in there:
                continue
            row = {**train(mode, seed, text, **run), **made_by, "date": now()}
            rows.append(row)
            with args.rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{mode:<45} seed {seed}: {row['held_out_bits']:.4f} bits a byte, {row['seconds']} s", flush=True)
    if args.picture is not None:
        draw(rows, args.picture)
    for mode, mean, difference, deviations in summary(rows) if args.seeds > 1 else ():
        print(f"{mode:<45} {mean:.4f} {difference:+.4f} {deviations:+.1f} deviations")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
