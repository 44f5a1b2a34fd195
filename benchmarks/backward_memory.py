"""The most memory that training takes at once, with `optimizer.step()` and with `step_in_backward`.

    python benchmarks/backward_memory.py [--device cuda] [--width 2048] [--layers 24] [--out FOLDER]

Each is measured in a process of its own: on a CPU what the process had resident at its peak, less what it had before
the model was made; on a GPU what torch's allocator had given out. On a CPU, glibc is told to give large blocks back
when they are freed (MALLOC_MMAP_THRESHOLD_): by itself, it comes to keep them, and the peak is the same either way.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.report import file_name, metadata, write_json
from benchmarks.timing import PROCESSOR, Cuda
from nexus.optim import FusedAdamW
from nexus.training import step_in_backward

WAYS = ("optimizer.step()", "step_in_backward")
MIB = 2**20


def peak(way: str, device: str, width: int, layers: int) -> float:
    """MiB of parameters, gradients, moments and activations."""
    before = 0 if device == "cuda" else _resident_peak()
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers))).to(device)
    optimizer = FusedAdamW(model.parameters(), lr=1e-3)
    if way == "step_in_backward":
        step_in_backward(model, optimizer)
    for _ in range(3):
        model(torch.ones(2, width, device=device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    return (_resident_peak() - before) / 1024


def _resident_peak() -> int:
    """KiB, on Linux. Not of getrusage(), which begins with the peak of the process that has started this one."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--width", type=int, default=2048, help="of each square layer")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--out", type=Path, default=None, help="folder for the rows, as JSON")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in the process of one measurement
    args = parser.parse_args()
    if args.way is not None:
        print(peak(args.way, args.device, args.width, args.layers))
        return 0
    sizes = ["--device", args.device, "--width", str(args.width), "--layers", str(args.layers)]
    gradients = args.layers * args.width**2 * 4 / MIB
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows = []
    print(f"gradients of {args.layers} layers of {args.width} x {args.width}: {gradients:.0f} MiB")
    for way in WAYS:
        command = [sys.executable, str(Path(__file__).resolve()), *sizes, "--way", way]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        measured = float(result.stdout)
        rows.append({"way": way, "peak_mib": round(measured, 1)})
        print(f"{way:<20} {measured:8.0f} MiB at the peak")
    if args.out is not None:
        data = metadata(Cuda() if args.device == "cuda" else PROCESSOR)
        name = file_name(data["date"], f"{data.get('gpu') or data['cpu']} backward memory")
        content = {"metadata": data, "width": args.width, "layers": args.layers, "gradients_mib": gradients}
        write_json(args.out / name, {**content, "rows": rows})
        print(f"Rows: {args.out / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
