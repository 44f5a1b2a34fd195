"""What `make gpu` runs on the GPU beside the tests and the benchmark. Each check writes what it found as JSON.

python -m benchmarks.gpu_checks environment|small-case|rates FILE
"""

from __future__ import annotations

import itertools
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ON_GPU = ("cuda", "triton")  # backends
EVALUATORS = ("native", *ON_GPU, "reference")
RATE_STEPS = 100_000
SMALL_STEPS = 3
TOLERANCE = {"float32": 1e-6, "bfloat16": 4e-3}  # of parameters of about 0.1 that have gone 0.02: two roundings


def environment() -> dict[str, Any]:
    """Versions and the GPU; exits with a line that says what is missing."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"{sys.executable} cannot import torch ({error}); GPU_PYTHON=... names another Python")
    if not torch.cuda.is_available():
        kind = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        sys.exit(f"this machine has no GPU that torch {torch.__version__}, {kind}, can use")
    properties = torch.cuda.get_device_properties()
    if torch.version.cuda is None:
        sys.exit(f"{properties.name} is not a CUDA GPU; only python -m pytest -m gpu runs there")
    return {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "gpus": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


SIZES = (0, 1, 3, 127, 1025, 16_385, 40_001)  # with tails


def small_case(device: str = "cuda", names: Sequence[str] = ON_GPU) -> dict[str, Any]:
    """Steps of every kernel, compared with the reference: what a sanitizer watches."""
    from nexus import backends

    available = [info.name for info in backends.describe() if info.name in names and info.available]
    if not available:
        sys.exit(f"there is nothing to check: {' and '.join(names)} are not available")
    differences = {}
    for name, dtype, options in itertools.product(
        available, ("float32", "bfloat16"), ({}, {"max_grad_norm": 1.0, "amsgrad": True, "skip_nonfinite": True})
    ):
        what = f"{name}, {dtype}, {', '.join(options) or 'no options'}"
        try:
            differences[what] = beside_reference(device, name, dtype, options)
        except ValueError as error:
            sys.exit(f"{what}: {error}")
        print(f"{what}: largest difference {differences[what]:.1e}", flush=True)
    return differences


def beside_reference(device: str, backend: str, dtype: str, options: dict[str, Any]) -> float:
    """The largest difference of parameters after a few steps from the reference's, on the CPU; "mixed": in turns.

    Raises:
        ValueError: it is more than two roundings.
    """
    import torch

    from nexus.optim import FusedAdamW
    from nexus.schedules import WSD

    dtypes = itertools.cycle(("float32", "bfloat16") if dtype == "mixed" else (dtype,))
    kinds = [getattr(torch, kind) for kind, _ in zip(dtypes, SIZES, strict=False)]
    sides = []
    for where, name in ((device, backend), ("cpu", "reference")):
        torch.manual_seed(0)
        params = [(0.1 * torch.randn(size)).to(kind).to(where) for size, kind in zip(SIZES, kinds, strict=True)]
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype).to(where)
        optimizer = FusedAdamW(
            params, lr=WSD(warmup_steps=1, stable_steps=None, decay_steps=1, peak_lr=1e-2), backend=name, **options
        )
        for _ in range(SMALL_STEPS):
            optimizer.step()
        sides.append([param.cpu().double() for param in params])
    difference = max(float((a - b).abs().max()) for a, b in zip(*sides, strict=True) if a.numel())
    allowed = TOLERANCE["bfloat16" if dtype == "mixed" else dtype]
    if not difference <= allowed:
        raise ValueError(f"{difference:.1e} from the reference, more than {allowed:.0e}")
    return difference


def rates(count: int = RATE_STEPS, names: Sequence[str] = EVALUATORS) -> dict[str, Any]:
    """Every evaluator at every step of a run, beside the oracle: how often it differs in float32."""
    import torch

    from nexus import backends
    from nexus.schedules import WSD, Cosine, CosineRestarts, evaluate

    tenth = count // 10
    schedules = [
        *(
            WSD(
                warmup_steps=tenth,
                stable_steps=5 * tenth,
                decay_steps=3 * tenth,
                peak_lr=1e-3,
                min_lr=1e-5,
                decay_type=decay,
            )
            for decay in ("linear", "cosine", "sqrt")
        ),
        WSD(warmup_steps=tenth, stable_steps=0, decay_steps=9 * tenth, peak_lr=1e-3),
        CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=tenth, cycle_mult=1.0, warmup_steps=tenth // 2),
        CosineRestarts(peak_lr=1e-3, min_lr=1e-6, cycle_length=tenth // 10, cycle_mult=1.5),
        Cosine(peak_lr=1e-3, total_steps=9 * tenth, min_lr=1e-5, warmup_steps=tenth),
    ]
    steps = torch.arange(count)
    found: dict[str, Any] = {}
    for name, available, detail in (info for info in backends.describe() if info.name in names):
        if not available:
            found[name] = {"not run": detail}
            continue
        where = "cuda" if name in ON_GPU else "cpu"
        unequal = 0
        for schedule in schedules:
            oracle = torch.tensor(schedule.values(0, count), dtype=torch.float64).float()
            values = evaluate(schedule, steps, where, name).cpu().float()
            differs = int((values.view(torch.int32) != oracle.view(torch.int32)).sum())
            if differs:
                print(f"{name}: {schedule!r} differs at {differs} of {count} steps")
            unequal += differs
        found[name] = {"steps": count * len(schedules), "unequal": unequal}
        print(f"{name}: {unequal} of {count * len(schedules)} rates differ from the oracle in float32", flush=True)
    return found


def unequal(found: dict[str, Any]) -> list[str]:
    """The evaluators that differ from the oracle or have not run."""
    return [name for name in EVALUATORS if found.get(name, {}).get("unequal") != 0]


if __name__ == "__main__":
    check, path = sys.argv[1:]
    found = {"environment": environment, "small-case": small_case, "rates": rates}[check]()
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if check == "rates" and unequal(found) else 0)
