"""Builds the extension nexus._native from csrc/ with a C++17 compiler, pybind11 and ninja. It needs no torch.

Without a working compiler nexus is installed all the same, without the extension; the reason goes to a file
in the package, which nexus reads at run time.

Environment: CXX, CXXFLAGS and LDFLAGS as usual. NEXUS_REQUIRE_NATIVE=1 makes a failed build an error, and
NEXUS_WERROR=1 a compiler warning.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*.cpp"))

# Neither -ffast-math nor contraction: every instruction set is to give the numbers that the tests compare.
# Nothing reads errno or floating-point traps, and without them loops vectorise.
CXX_FLAGS = "-std=c++17 -O3 -g0 -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=off "
CXX_FLAGS += "-fno-math-errno -fno-trapping-math"

# These sources are compiled once for each instruction set, in a namespace named by NEXUS_ISA; one of them is
# picked at run time. All others are compiled once, for the oldest processor.
PER_ISA_SOURCES = ("csrc/cpu/adamw.cpp",)
X86_ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mavx2 -mprefer-vector-width=512",
}

NINJA_RULES = """
rule cxx
  command = $cxx -MD -MF $out.d $cxx_flags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $out

rule link
  command = $cxx $in $link_flags -o $out
  description = link $out

"""


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def find_compiler() -> tuple[str, bool]:
    """The compiler's command, and whether it compiles for x86-64."""
    if os.name == "nt":
        raise CompileError("the extension builds with GCC or Clang on Linux and macOS; MSVC is not supported")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = [*shlex.split(compiler), "-dumpmachine"]
    try:
        machine = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"no working C++ compiler: {error}. Install g++ or clang++, or set CXX.") from None
    return compiler, machine.startswith(("x86_64", "amd64"))


def ninja_file(objects: Path, library: Path) -> str:
    """The text of build.ninja, with paths relative to ROOT."""
    import pybind11

    compiler, x86 = find_compiler()
    isa_flags = {"baseline": "", **(X86_ISA_FLAGS if x86 else {})}
    macos = sys.platform == "darwin"
    settings = {
        "builddir": [str(objects)],  # where ninja keeps its records
        "cxx": [compiler],
        "cxx_flags": [
            CXX_FLAGS,
            "-DNEXUS_X86=1" if x86 else "",
            "-Wall -Wextra -Werror" if is_set("NEXUS_WERROR") else "",
            os.environ.get("CXXFLAGS", ""),
        ],
        "link_flags": [
            "-bundle -undefined dynamic_lookup" if macos else "-shared -s -ldl -pthread",
            os.environ.get("LDFLAGS", ""),
        ],
    }
    headers = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
    python_flags = shlex.join(f"-isystem{path}" for path in sorted(headers))

    edges = []  # (object, source, flags)
    # The oldest set first: of an inline function's copies the linker keeps the first, and that one has to run
    # on every processor.
    for isa, flags in isa_flags.items():
        for source in SOURCES:
            stem = objects / Path(source).relative_to("csrc").with_suffix("")
            if source in PER_ISA_SOURCES:
                edges.append((f"{stem}.{isa}.o", source, f"-DNEXUS_ISA={isa} {flags}"))
            elif isa == "baseline":
                # Kernels know no Python: only the sources at the top of csrc see its headers.
                at_top = Path(source).parent.name == "csrc"
                edges.append((f"{stem}.o", source, python_flags if at_top else ""))

    lines = [f"{name} = {' '.join(words).replace('$', '$$')}" for name, words in settings.items()]
    lines.append(NINJA_RULES)
    for target, source, flags in edges:
        lines += [f"build {target}: cxx {source}", "  flags = " + flags.replace("$", "$$")]
    lines += [f"build {library}: link {' '.join(target for target, _, _ in edges)}", ""]
    return "\n".join(lines)


def compile_native(destination: Path) -> None:
    """Compile what changed since the last time, and put the extension at ``destination``."""
    find_compiler()  # first of all says where the extension cannot be built
    import fcntl

    # A fixed place, not setuptools' build_temp: that is a new one at each editable install.
    objects = Path("build", "native", sysconfig.get_config_var("SOABI") + "-werror" * is_set("NEXUS_WERROR"))
    build_file, library = objects / "build.ninja", objects / "_native.so"
    (ROOT / objects).mkdir(parents=True, exist_ok=True)
    with open(ROOT / objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would link each other's half-written objects
        (ROOT / build_file).write_text(ninja_file(objects, library))
        ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
        ninja += ["-f", str(build_file)]
        output = []
        with subprocess.Popen(ninja, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            for line in run.stdout:
                print(line, end="", flush=True)
                output.append(line)
        if run.returncode:
            raise CompileError("csrc does not compile:\n" + "".join(output[-40:]))
        # Replaced, not overwritten: a running process may have the old one mapped.
        shutil.copy(ROOT / library, destination.with_suffix(".new"))
        os.replace(destination.with_suffix(".new"), destination)


class BuildNative(build_ext):
    """Compiles with ninja, and lets the install go on without the extension."""

    def run(self) -> None:
        extension = Path(self.get_ext_fullpath("nexus._native"))
        reason_file = extension.with_name("_native_build_failure.txt")
        extension.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_native(extension)
            reason_file.unlink(missing_ok=True)
        except (CompileError, ImportError, OSError) as error:
            if is_set("NEXUS_REQUIRE_NATIVE"):
                raise CompileError(str(error)) from None
            extension.unlink(missing_ok=True)  # one from an older source would hide the failure
            reason_file.write_text(f"{error}\n")
            print(f"warning: nexus is installed without its native extension: {error}", file=sys.stderr)
            self.extensions = []


setup(ext_modules=[Extension("nexus._native", SOURCES)], cmdclass={"build_ext": BuildNative})
