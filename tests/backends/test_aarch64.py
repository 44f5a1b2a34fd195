"""The compiled kernels, cross-compiled for aarch64 and emulated: the same bits as on the processor at hand."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from cuda_shim.build import imported

ROOT = Path(__file__).resolve().parents[2]
COMPILER, DISASSEMBLER, EMULATOR = "aarch64-linux-gnu-g++", "aarch64-linux-gnu-objdump", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"  # of the emulated processor, where Debian has them

pytestmark = pytest.mark.xdist_group("aarch64")  # compiled once for all


def compiled(compiler: str, program: Path) -> Path:
    setup = imported("nexus_setup", ROOT / "setup.py")
    flags = [*setup.CXX_FLAGS.split(), "-Wall", "-Wextra", "-Werror", "-Icsrc", "-DNEXUS_ISA=baseline", "-pthread"]
    sources = [*setup.CPU_SOURCES, "tests/aarch64/steps.cpp"]
    subprocess.run([compiler, *flags, *sources, "-o", program], cwd=ROOT, check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs steps, on aarch64."""
    missing = [tool for tool in (COMPILER, DISASSEMBLER, EMULATOR) if shutil.which(tool) is None]
    if missing and os.environ.get("CI") not in ("1", "true"):
        pytest.skip(f"{', '.join(missing)} not found: apt-get install g++-aarch64-linux-gnu qemu-user")
    return compiled(COMPILER, tmp_path_factory.mktemp("aarch64") / "steps")


def printed(*command: str | Path) -> dict[str, str]:
    """What each case left, by its name."""
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(line.rsplit(": ", 1) for line in run.stdout.splitlines())


def test_steps_leave_the_bits_of_this_processor(program: Path) -> None:
    here = printed(compiled("c++", program.with_name("steps_here")))
    there = printed(EMULATOR, "-L", LIBRARIES, program)
    assert there.pop("instruction set") == "neon"
    del here["instruction set"]
    assert here.keys() == there.keys()
    assert sum(not name.startswith("rate") for name in here) > 1500
    # Of the C library's functions, the last bit is the library's.
    inexact = {name for name in here if "(library)" in name}
    assert [name for name in here.keys() - inexact if here[name] != there[name]] == []
    for name in inexact:
        assert math.isclose(float.fromhex(here[name]), float.fromhex(there[name]), rel_tol=2**-50), name


def test_loops_are_vectorised(program: Path) -> None:
    """Whatever takes the roots of single numbers, at the end of a tensor, takes those of vectors too."""
    text = subprocess.run([DISASSEMBLER, "-d", program], check=True, capture_output=True, text=True).stdout
    roots = defaultdict(set)
    function = ""
    for line in text.splitlines():
        if name := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = name[1]
        elif root := re.search(r"\tfsqrt\t([sdv])\d+(\.[24][sd])?", line):
            roots[function].add(root[2] or root[1])
    updates = {function: kinds for function, kinds in roots.items() if "update" in function or "OnePass" in function}
    assert len(updates) > 12
    for function, kinds in updates.items():
        assert kinds & {".4s", ".2d"}, function
