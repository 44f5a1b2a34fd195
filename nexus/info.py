"""`python -m nexus info`: what is installed here, and what runs."""

from __future__ import annotations

import argparse
import os
import platform

import torch

from nexus import __version__, backends
from nexus.optim.storage import bytes_table


def run(args: argparse.Namespace) -> int:
    """Print versions, threads, backends (or why one is missing) with instruction sets, and bytes a parameter."""
    lines = [
        ("nexus", __version__),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, {_cuda()}"),
        ("threads", f"{torch.get_num_threads()} of torch, {os.cpu_count()} CPU cores"),
    ]
    for name, available, detail in backends.describe():
        lines.append((name, detail if available else f"not available: {detail}"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
    print("\nbytes a parameter, its gradient and its state (bytes that an update moves):")
    for mode, resident, moved in bytes_table():
        print(f"  {mode:44}{resident:8.2f}  ({moved:.2f})")
    return 0


def _cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "built without CUDA"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else f"built for ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        return f"{built}, no device found"
    return f"{built}, {torch.cuda.get_device_name()}"
