"""Compiles what the Triton backend launches, without a GPU; prints what became of it as JSON.

To be run without TRITON_INTERPRET: `python tests/backends/triton_launches.py`. Steps of optimizers on the CPU are
recorded instead of launched; then what was recorded is compiled for each architecture.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from nexus.backends import triton as backend
from nexus.backends import triton_kernels
from nexus.optim import EMA, FusedAdamW
from nexus.optim.storage import SMALL
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, evaluate

ARCHS = (80, 90, 100)
CACHE = Path(__file__).resolve().parents[2] / "build" / "triton"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
Launch = tuple[str, tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]  # kernel, signature, constants

BITS_8 = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
BITS_16 = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}
Kind = tuple[torch.dtype, torch.dtype, dict[str, Any]]  # parameter, gradient, options of the group
COMPILED: dict[str, list[Kind]] = {
    "float32": [(torch.float32, torch.float32, {})],
    "float32 amsgrad": [(torch.float32, torch.float32, {"amsgrad": True})],
    "bfloat16": [(torch.bfloat16, torch.bfloat16, {})],
    "bfloat16 and float32 gradients": [(torch.bfloat16, torch.float32, {})],
    "float16": [(torch.float16, torch.float16, {})],
    "float64": [(torch.float64, torch.float64, {"amsgrad": True})],
    "mixed": [(torch.float32, torch.float32, {}), (torch.bfloat16, torch.bfloat16, {})],
    "float32, 8 bits": [(torch.float32, torch.float32, BITS_8)],
    "bfloat16 + 32, bfloat16": [(torch.bfloat16, torch.bfloat16, {"master_weight_bits": 32, **BITS_16})],
    "bfloat16 + 24, 8 bits": [(torch.bfloat16, torch.bfloat16, {"master_weight_bits": 24, **BITS_8})],
    "averaged": [(torch.float32, torch.float32, {"average": EMA()})],
    "averaged, bfloat16": [
        (torch.bfloat16, torch.bfloat16, {"master_weight_bits": 32, "average": EMA(dtype=torch.bfloat16), **BITS_16})
    ],
    "all by chance": [
        (torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True, **BITS_8, "amsgrad": True}),
        (torch.bfloat16, torch.bfloat16, {"stochastic_rounding": True, "master_weight_bits": 24, **BITS_16}),
    ],
}


class Recorder:
    """Stands in for `triton_kernels`; keeps what each launch would be compiled for."""

    def __init__(self) -> None:
        self.launches: dict[Launch, None] = {}

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(triton_kernels, name)
        compiler = make_backend(GPUTarget("cuda", 90, 32))
        binder = create_function_from_signature(kernel.signature, kernel.params, compiler)

        class Launches:
            def __getitem__(_, grid: tuple[int, ...]) -> Callable[..., None]:
                def launch(*arguments: Any, **options: Any) -> None:
                    bound, specialization, left = binder(*arguments, **options)
                    assert left == backend.OPTIONS
                    signature, constants = [], []
                    for parameter, (kind, attribute) in zip(bound, specialization, strict=True):
                        signature.append((parameter, kind))
                        if kind == "constexpr":
                            constants.append((parameter, bound[parameter]))
                        elif attribute:
                            signature[-1] = (parameter, f"{kind}, specialized for {attribute!r}")
                    self.launches[name, tuple(signature), tuple(constants)] = None

                return launch

        return Launches()


def recording() -> Recorder:
    """Let the backend take tensors on the CPU, and launch nothing."""
    recorder = Recorder()
    backend.DEVICE_TYPES = frozenset({"cpu"})
    backend.unavailable = lambda devices=(): None
    backend._launching = lambda device: contextlib.nullcontext(recorder)
    return recorder


def param_with_grad(
    size: int, dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype = torch.float32
) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    param.grad_dtype = grad_dtype
    param.grad = torch.zeros(size, dtype=grad_dtype)
    return param


def train_variously() -> None:
    """Whatever a user changes without changing dtypes."""
    for sizes in ([1], [16], [17, 0, 1009], [16_384] * 16, [40_000, *range(300)]):
        for options in (
            {},
            {"max_grad_norm": 1.0, "skip_nonfinite": True},
            {"lr": WSD(warmup_steps=1, stable_steps=16, decay_steps=17, peak_lr=1.0)},
        ):
            params = [param_with_grad(size) for size in sizes]
            optimizer = FusedAdamW(params, backend="triton", **options)
            for step in range(3):
                optimizer.param_groups[0]["max_grad_norm"] = step + 1.0
                optimizer.param_groups[0]["weight_decay"] = 16.0 * step
                optimizer.step()
            for count in range(2, 18):
                optimizer.add_param_group(
                    {"params": [param_with_grad(count)], "lr": Cosine(peak_lr=1.0, total_steps=count)}
                )
            optimizer.history(capacity=len(sizes))
            optimizer.grad_scale = torch.ones(1)
            optimizer.found_inf = torch.zeros(())
            optimizer.step()
    for schedule in (
        Constant(1.0),
        WSD(warmup_steps=1, stable_steps=2, decay_steps=3, peak_lr=1.0),
        CosineRestarts(peak_lr=1.0, cycle_length=2, cycle_mult=1.1),
    ):
        for count in (1, 15, 16, 17):
            evaluate(schedule, torch.arange(count), backend="triton")
            evaluate(schedule, torch.arange(count + 1)[1:], backend="triton")


def launches_of(kinds: list[Kind]) -> list[Launch]:
    recorder = recording()
    groups = [{"params": [param_with_grad(SMALL, p, g)], **options} for p, g, options in kinds]
    FusedAdamW(groups, max_grad_norm=1.0, backend="triton").step()
    evaluate(Constant(1.0), torch.arange(9), backend="triton")
    return list(recorder.launches)


def inspected(launch: Launch, arch: int) -> dict[str, Any]:
    """Compile one kernel, and read the result."""
    name, signature, constants = launch
    source = ASTSource(getattr(triton_kernels, name), dict(signature), dict(constants))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(backend.OPTIONS))
    cubin = compiled.metadata_group[f"{name}.cubin"]
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = compiled.asm["ptx"]
    return {
        "kernel": name,
        "arch": arch,
        "registers": resources["REG"],
        "local_bytes": resources["STACK"] + resources["LOCAL"],
        "loads": re.findall(r"ld\.global\.[\w.]+", ptx),
        "stores": re.findall(r"st\.global\.[\w.]+", ptx),
        "arithmetic": sorted(set(re.findall(r"\b(?:fma|div|sqrt)\.[\w.]*f(?:32|64)\b", ptx))),
    }


def main() -> None:
    assert not backend.INTERPRETS
    torch.set_num_threads(1)
    recorder = recording()
    train_variously()
    found: dict[str, Any] = {"launches": [str(launch) for launch in recorder.launches], "compiled": {}}
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)  # so that only what has changed is compiled
    for what, kinds in COMPILED.items():
        wanted = [launch for launch in launches_of(kinds) if what == "mixed" or launch[0] in ("update", "norm")]
        found["compiled"][what] = [inspected(launch, arch) for arch in ARCHS for launch in wanted]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
