"""The Triton kernels as they are compiled for GPUs, which needs none: variants, accesses, registers, rounding."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("triton_compiled")]  # one worker compiles

# A streaming multiprocessor has 65,536 registers: 36 warps of 32 threads at 56 each, 20 at 96. Measured: 55 for
# float32, 64 at most with amsgrad; 72 for half precision (92 on sm_80), 92 for float64, 96 for several at once.
MOST_REGISTERS = {"float32": 56, "float32 amsgrad": 64}
MOST_REGISTERS_OF_OTHERS = 96
# State in fewer bits: 16 warps at 128, 12 at 168. The last has several at once.
MOST_REGISTERS |= {"bfloat16 + 32, bfloat16": 112, "bfloat16 + 24, 8 bits": 128, "all by chance": 168}
MOST_REGISTERS |= {"averaged": 64, "averaged, bfloat16": 128}
# Accesses of 128 bits in the aligned loop, of the parameter, the gradient and the moments: loads and stores.
WIDE = {
    "float32": (4, 3),
    "float32 amsgrad": (5, 4),
    "bfloat16": (2 + 4, 1 + 4),  # eight elements a thread: two accesses for each moment
    "bfloat16 and float32 gradients": (1 + 2 + 4, 1 + 4),
    "float16": (2 + 4, 1 + 4),
    "float64": (5, 4),  # with amsgrad
    "mixed": (4 + 6, 3 + 5),
    # Where a stream is in 8 bits, the accesses to it are narrower.
    "float32, 8 bits": (2, 1),
    "bfloat16 + 24, 8 bits": (2, 1),
    "bfloat16 + 32, bfloat16": (5, 4),
    "averaged": (5, 4),
    "averaged, bfloat16": (6, 5),
    "all by chance": (2 + 4, 1 + 3),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("triton_launches.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def kernels(found: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(what, kernel) for what, own in found["compiled"].items() for kernel in own if kernel["kernel"] == name]


def test_nothing_is_compiled_twice_whatever_a_user_changes(found: dict[str, Any]) -> None:
    names = sorted(re.match(r"\('(\w+)'", launch)[1] for launch in found["launches"])
    assert names == ["evaluate", "norm", "norm_total", "prologue", "update"], found["launches"]
    assert "specialized" not in str(found["launches"])


def test_aligned_accesses_are_of_128_bits(found: dict[str, Any]) -> None:
    updates = kernels(found, "update")
    assert len(updates) == 3 * len(WIDE)
    for what, kernel in updates:
        assert (wide(kernel["loads"]), wide(kernel["stores"])) == WIDE[what], (what, kernel)
    for what, kernel in kernels(found, "norm"):
        assert wide(kernel["loads"]) >= 1, (what, kernel)


def wide(accesses: list[str]) -> int:
    return sum(access.endswith((".v4.b32", ".v2.b64")) for access in accesses)


def test_no_register_is_spilled(found: dict[str, Any]) -> None:
    for name in ("update", "norm", "norm_total"):
        most = MOST_REGISTERS if name == "update" else {}
        for what, kernel in kernels(found, name):
            assert kernel["local_bytes"] == 0, (what, kernel)
            assert kernel["registers"] <= most.get(what, MOST_REGISTERS_OF_OTHERS), (what, kernel)
    for name in ("prologue", "evaluate"):  # where the cosine of a large number would need a table of its own
        for what, kernel in kernels(found, name):
            assert kernel["local_bytes"] <= 64, (what, kernel)


def test_an_update_is_rounded_as_the_other_backends_round(found: dict[str, Any]) -> None:
    for what, kernel in kernels(found, "update"):
        bits = 64 if what == "float64" else 32
        assert kernel["arithmetic"] == [f"div.rn.f{bits}", f"sqrt.rn.f{bits}"], (what, kernel)  # and no fma
    for what, kernel in [*kernels(found, "prologue"), *kernels(found, "evaluate")]:
        assert kernel["arithmetic"] == ["div.rn.f64", "fma.rn.f64", "sqrt.rn.f64"], (what, kernel)  # fma: in cos
