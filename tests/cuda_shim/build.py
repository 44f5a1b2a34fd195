"""Compiles the CUDA sources as C++, under the shim, into build/shim."""

from __future__ import annotations

import fcntl
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
SHIM = "tests/cuda_shim"
OBJECTS = Path("build/shim")
MODULE = "_native_shim"
SHIM_SOURCES = ("fibers", "faults", "streams", "memory", "runtime")

# The checks call functions of faults.cpp, and need no library.
KERNEL_FLAGS = f"-O2 -Wno-unknown-pragmas -I{SHIM} -x c++ -include cuda_runtime.h -ftrivial-auto-var-init=pattern"
KERNEL_FLAGS += " -fsanitize=alignment,null,bounds,signed-integer-overflow -fno-sanitize-recover=all"


def imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str = MODULE) -> Path:
    """Build the whole extension as the module ``name``; or, if that is "toy", a library of toy.cu alone."""
    setup = imported("nexus_setup", ROOT / "setup.py")

    def edges(sources, flags=""):
        return [setup.Edge(f"{OBJECTS / Path(source).name}.o", "cxx", str(source), flags) for source in sources]

    def shared_memory_edge(side):
        flags = f"-DNEXUS_SHIM_EDGE=nexus_shim_shared_{side}"
        return setup.Edge(f"{OBJECTS}/shared_{side}.o", "cxx", f"{SHIM}/shared_edge.cpp", flags)

    kernels = [f"{SHIM}/toy.cu"] if name == "toy" else setup.CUDA_SOURCES  # host code too, for CUDA's functions
    # The linker keeps this order.
    linked = [shared_memory_edge("begin"), *edges(kernels, KERNEL_FLAGS), shared_memory_edge("end")]
    linked += edges([f"{SHIM}/{file}.cpp" for file in SHIM_SOURCES], "-U_FORTIFY_SOURCE")
    # Objects that know nothing of CUDA are those of the ordinary build; so ninja's records are, too.
    shared = setup.object_folder()
    if name != "toy":
        flags = f"-DNEXUS_CUDA=1 -DNEXUS_MODULE={name}"
        linked += setup.module_edges(OBJECTS, flags) + setup.cpu_edges(shared)
        linked += edges(setup.CUDA_MODULE_SOURCES, f"-I{SHIM} {setup.python_flags()} {flags}")

    library = OBJECTS / f"{name}.so"
    build_file = OBJECTS / f"{name}.ninja"
    (ROOT / shared).mkdir(parents=True, exist_ok=True)
    (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    with open(ROOT / shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist build at the same time
        # Not stripped: controls.py reads the kernels' names.
        text = setup.ninja_file(shared, library, linked).replace("-Wl,-s ", "")
        (ROOT / build_file).write_text(text)
        run = subprocess.run([*ninja, "-f", str(build_file)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{build_file} failed:\n{run.stdout[-8000:]}{run.stderr}")
    return ROOT / library


def load(name: str = MODULE) -> ModuleType:
    """The extension with the CUDA kernels, which run on the CPU. See controls.Shim for what steers them."""
    return imported(name, build(name))
