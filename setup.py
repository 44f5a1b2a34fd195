"""Builds the extension nexus._native from csrc/ with a C++17 compiler, pybind11 and ninja. It needs no torch.

Without a working compiler nexus is installed all the same, without the extension; without a working nvcc,
without its CUDA kernels. The reason goes to a file in the package, which nexus reads at run time.

Environment: CXX, CXXFLAGS and LDFLAGS as usual. NEXUS_REQUIRE_NATIVE=1 makes a failed build an error, and
NEXUS_WERROR=1 a compiler warning. NEXUS_CUDA=0 leaves the CUDA kernels out, NEXUS_CUDA=1 makes it an error when
they cannot be built, and NEXUS_CUDA_ARCHS="sm_90 sm_120" names the GPUs to compile for. nvcc is looked for in
CUDA_HOME, in CUDA_PATH, on PATH and in /usr/local/cuda.

On Linux a CXX that compiles for another processor, such as aarch64-linux-gnu-g++, makes a wheel for that one.
release/wheels.py makes the wheels that are published.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

ROOT = Path(__file__).resolve().parent


def sources(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern))


CPU_SOURCES = sources("csrc/cpu/*.cpp")
CUDA_SOURCES = sources("csrc/cuda/*.cu") + sources("csrc/cuda/*.cpp")
CUDA_MODULE_SOURCES = sources("csrc/python/cuda_module.cpp")
MODULE_SOURCES = [source for source in sources("csrc/python/*.cpp") if source not in CUDA_MODULE_SOURCES]

# Neither -ffast-math nor contraction: every instruction set is to give the numbers that the tests compare.
# Nothing reads errno or floating-point traps, and without them loops vectorise.
CXX_FLAGS = "-std=c++17 -O3 -g0 -DNDEBUG -fPIC -fvisibility=hidden -ffp-contract=off "
CXX_FLAGS += "-fno-math-errno -fno-trapping-math"

# These sources are compiled once for each instruction set, in a namespace named by NEXUS_ISA; one of them is
# picked at run time. All others are compiled once, for the oldest processor.
PER_ISA_SOURCES = ("csrc/cpu/update.cpp",)
X86_ISA_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mavx2 -mprefer-vector-width=512",
}

# No contraction here either. Each GPU's code is compressed, and compiled at the same time as the others'.
NVCC_FLAGS = "-std=c++17 -O3 -DNDEBUG -fmad=false -Xfatbin=-compress-all --threads=0 "
NVCC_FLAGS += "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
DEFAULT_CUDA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")

NINJA_RULES = """
rule cxx
  command = $cxx -MD -MF $out.d $cxx_flags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = c++ $out

rule nvcc
  command = $nvcc -MD -MF $out.d $nvcc_flags $flags -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = nvcc $out

rule link
  command = $linker $in $link_flags -o $out
  description = link $out

"""


class Edge(NamedTuple):
    """A file to compile: its object, the ninja rule, the source, and flags of its own."""

    target: str
    rule: str
    source: str
    flags: str = ""


class Cuda(NamedTuple):
    """The compiler, and the GPUs to compile for, the oldest first."""

    nvcc: str
    archs: list[str]

    def flags(self) -> str:
        """Code for each GPU, and PTX from which a driver compiles for those between and after them."""
        numbers = [arch.removeprefix("sm_") for arch in self.archs]
        targets = [f"arch=compute_{number},code=sm_{number}" for number in numbers]
        for number in dict.fromkeys((numbers[0], numbers[-1])):
            targets.append(f"arch=compute_{number},code=compute_{number}")
        return " ".join(f"-gencode={target}" for target in targets)


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def find_compiler() -> tuple[str, str]:
    """The compiler's command, and the machine that it compiles for, such as x86_64-linux-gnu."""
    if os.name == "nt":
        raise CompileError("the extension builds with GCC or Clang on Linux and macOS; MSVC is not supported")
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    command = [*shlex.split(compiler), "-dumpmachine"]
    try:
        machine = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"no working C++ compiler: {error}. Install g++ or clang++, or set CXX.") from None
    return compiler, machine


def is_x86(machine: str) -> bool:
    return machine.startswith(("x86_64", "amd64"))


def target_another_processor() -> None:
    """Where CXX compiles for another processor than Python's, name extension and wheel for that one.

    The two variables are Python's and setuptools' own. Python's headers are the same on every 64-bit Linux that
    torch supports.
    """
    if sys.platform != "linux" or "_PYTHON_HOST_PLATFORM" in os.environ:
        return
    try:
        target = find_compiler()[1].partition("-")[0]
    except CompileError:
        return  # the build says so
    own = sysconfig.get_platform().removeprefix("linux-")
    if {own, target} == {"x86_64", "aarch64"}:
        os.environ["_PYTHON_HOST_PLATFORM"] = f"linux-{target}"
        os.environ["SETUPTOOLS_EXT_SUFFIX"] = sysconfig.get_config_var("EXT_SUFFIX").replace(own, target)


def wanted_cuda() -> str:
    """The value of NEXUS_CUDA."""
    wanted = os.environ.get("NEXUS_CUDA") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise OptionError(f"NEXUS_CUDA is {wanted!r}; it has to be auto, 0 or 1")
    return wanted


def wanted_archs() -> list[str]:
    """What NEXUS_CUDA_ARCHS holds."""
    archs = re.split(r"[\s,;]+", os.environ.get("NEXUS_CUDA_ARCHS", "").strip())
    wrong = [arch for arch in archs if arch and not re.fullmatch(r"sm_\d+", arch)]
    if wrong:
        raise OptionError(f"NEXUS_CUDA_ARCHS holds {wrong[0]!r}; it has to be a list such as 'sm_90 sm_120'")
    return sorted(filter(None, set(archs)), key=lambda arch: int(arch[3:]))


def find_nvcc() -> str:
    """The CUDA compiler; CompileError says that there is none."""
    roots = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")))
    places = [*(os.path.join(root, "bin") for root in roots), None, "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None:
        raise CompileError("nvcc was not found when nexus was built; install the CUDA toolkit or set CUDA_HOME")
    return nvcc


def find_cuda() -> Cuda:
    """What to compile the CUDA kernels with; CompileError says why they are left out."""
    wanted, archs = wanted_cuda(), wanted_archs()  # a wrong setting is an error, needed or not
    if wanted == "0":
        raise CompileError("NEXUS_CUDA=0 was set when nexus was built")
    nvcc = find_nvcc()
    try:
        run = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"nvcc does not work: {error}. {getattr(error, 'stderr', '')}".strip()) from None
    if " " in find_compiler()[0] and "SETUPTOOLS_EXT_SUFFIX" in os.environ:
        raise CompileError("nvcc takes no CXX with arguments for another processor; put them in CXXFLAGS")
    offered = run.stdout.split()
    unknown = [arch for arch in archs if arch not in offered]
    if unknown:
        raise OptionError(f"NEXUS_CUDA_ARCHS holds {unknown[0]!r}; {nvcc} offers {', '.join(offered)}")
    archs = archs or [arch for arch in DEFAULT_CUDA_ARCHS if arch in offered]
    if not archs:
        raise CompileError(f"{nvcc} compiles for none of {', '.join(DEFAULT_CUDA_ARCHS)}")
    return Cuda(nvcc, archs)


def object_folder() -> Path:
    """Where objects that know no Python go, relative to ROOT, and in a folder each those of every Python.

    Not setuptools' build_temp: that is a new one at each editable install.
    """
    _, machine = find_compiler()
    return Path("build", "native", "-".join([machine, *wanted_archs()]) + "-werror" * is_set("NEXUS_WERROR"))


def python_flags() -> str:
    import pybind11

    headers = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
    return shlex.join(f"-isystem{path}" for path in sorted(headers))


def module_edges(module: Path, flags: str) -> list[Edge]:
    """The Python module's own sources: they alone see Python's headers."""
    flags = f"{python_flags()} {flags}"
    return [Edge(f"{module / Path(source).stem}.o", "cxx", source, flags) for source in MODULE_SOURCES]


def cpu_edges(objects: Path) -> list[Edge]:
    """The kernels for the CPU."""
    _, machine = find_compiler()
    edges = []
    # The oldest set first: of an inline function's copies the linker keeps the first, and that one has to run
    # on every processor.
    for isa, flags in {"baseline": "", **(X86_ISA_FLAGS if is_x86(machine) else {})}.items():
        for source in CPU_SOURCES:
            stem = objects / "cpu" / Path(source).stem
            if source in PER_ISA_SOURCES:
                edges.append(Edge(f"{stem}.{isa}.o", "cxx", source, f"-DNEXUS_ISA={isa} {flags}"))
            elif isa == "baseline":
                edges.append(Edge(f"{stem}.o", "cxx", source))
    return edges


def cuda_edges(objects: Path, module: Path, flags: str) -> list[Edge]:
    """The kernels for GPUs, what launches them, and what Python sees of it; nvcc knows CUDA's headers."""
    return [Edge(f"{objects / 'cuda' / Path(source).name}.o", "nvcc", source) for source in CUDA_SOURCES] + [
        Edge(f"{module / Path(source).stem}.o", "nvcc", source, f"{python_flags()} {flags}")
        for source in CUDA_MODULE_SOURCES
    ]


def ninja_file(objects: Path, library: Path, edges: list[Edge], cuda: Cuda | None = None) -> str:
    """The text of build.ninja, with paths relative to ROOT."""
    compiler, machine = find_compiler()
    macos = sys.platform == "darwin"
    werror = is_set("NEXUS_WERROR")
    settings = {
        "builddir": [str(objects)],  # where ninja keeps its records, of every Python's files
        "cxx": [compiler],
        "linker": [compiler],
        "cxx_flags": [
            CXX_FLAGS,
            "-DNEXUS_X86=1" if is_x86(machine) else "",
            "-Wall -Wextra -Werror" if werror else "",
            os.environ.get("CXXFLAGS", ""),
        ],
        "link_flags": [
            "-bundle -undefined dynamic_lookup" if macos else "-shared -Wl,-s -ldl -pthread",
            os.environ.get("LDFLAGS", ""),
        ],
    }
    if cuda:
        # nvcc links its runtime statically: that looks for a driver only when it is used, and meets no other
        # library's copy of itself.
        settings["nvcc"] = [shlex.quote(cuda.nvcc), "--forward-unknown-to-host-compiler"]
        settings["nvcc"].append("" if " " in compiler else f"-ccbin={compiler}")
        settings["nvcc_flags"] = [
            NVCC_FLAGS,
            cuda.flags(),
            "--Werror=all-warnings -Xcompiler=-Wall,-Wextra,-Werror" if werror else "",
        ]
        settings["linker"] = settings["nvcc"]
        settings["link_flags"].append("-cudart=static -Wl,--exclude-libs,ALL")

    lines = [f"{name} = {' '.join(words).replace('$', '$$')}" for name, words in settings.items()]
    lines.append(NINJA_RULES)
    for edge in edges:
        lines += [f"build {edge.target}: {edge.rule} {edge.source}", "  flags = " + edge.flags.replace("$", "$$")]
    lines += [f"build {library}: link {' '.join(edge.target for edge in edges)}", ""]
    return "\n".join(lines)


def build(objects: Path, library: Path, cuda: Cuda | None) -> None:
    """Compile what changed since the last time."""
    module = library.parent
    flags = "-DNEXUS_MODULE=_native" + " -DNEXUS_CUDA=1" * bool(cuda)
    edges = module_edges(module, flags) + cpu_edges(objects)
    if cuda:
        archs = shlex.quote(f'-DNEXUS_CUDA_ARCHS="{" ".join(cuda.archs)}"')
        edges += cuda_edges(objects, module, f"{flags} {archs}")
    build_file = module / "build.ninja"
    (ROOT / build_file).write_text(ninja_file(objects, library, edges, cuda))
    ninja = [sys.executable, "-m", "ninja"] if importlib.util.find_spec("ninja") else ["ninja"]
    ninja += ["-f", str(build_file)]
    output = []
    with subprocess.Popen(ninja, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        for line in run.stdout:
            print(line, end="", flush=True)
            output.append(line)
    if run.returncode:
        raise CompileError("csrc does not compile:\n" + "".join(output[-40:]))


def compile_native(destination: Path) -> str:
    """Put the extension at ``destination``. Returns why the CUDA kernels were left out, or an empty string."""
    find_compiler()  # first of all says where the extension cannot be built
    import fcntl

    objects = object_folder()
    library = objects / sysconfig.get_config_var("SOABI") / "_native.so"
    reason = ""
    (ROOT / library).parent.mkdir(parents=True, exist_ok=True)
    with open(ROOT / objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two builds at once would link each other's half-written objects
        try:
            build(objects, library, find_cuda())
        except CompileError as error:
            if wanted_cuda() == "1":
                raise
            reason = str(error)
            build(objects, library, None)
        # Replaced, not overwritten: a running process may have the old one mapped.
        shutil.copy(ROOT / library, destination.with_suffix(".new"))
        os.replace(destination.with_suffix(".new"), destination)
    return reason


class BuildNative(build_ext):
    """Compiles with ninja, and lets the install go on without the extension, or without its CUDA kernels."""

    def run(self) -> None:
        extension = Path(self.get_ext_fullpath("nexus._native"))
        reason_file = extension.with_name("_native_build_failure.txt")
        cuda_reason_file = extension.with_name("_native_cuda_failure.txt")
        extension.parent.mkdir(parents=True, exist_ok=True)
        for file in (reason_file, cuda_reason_file):
            file.unlink(missing_ok=True)
        try:
            cuda_reason = compile_native(extension)
        except (CompileError, ImportError, OSError) as error:
            if is_set("NEXUS_REQUIRE_NATIVE") or wanted_cuda() == "1":
                raise CompileError(str(error)) from None
            extension.unlink(missing_ok=True)  # one from an older source would hide the failure
            reason_file.write_text(f"{error}\n")
            print(f"warning: nexus is installed without its native extension: {error}", file=sys.stderr)
            self.extensions = []
        else:
            if cuda_reason:
                cuda_reason_file.write_text(f"{cuda_reason}\n")
                print(f"warning: nexus is installed without its CUDA kernels: {cuda_reason}", file=sys.stderr)


def readme() -> str:
    """README.md for the package index, where a path in the repository leads nowhere: each becomes an address."""
    (source,) = re.findall(r'^Source = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    init = (ROOT / "nexus" / "__init__.py").read_text("utf-8")
    (version,) = re.findall(r"^__version__ = [\"'](.*)[\"']$", init, re.MULTILINE)

    def absolute(link: re.Match) -> str:
        before, path, after = link.groups()
        if "://" in path or not (ROOT / path).exists():
            return link[0]
        if path.endswith((".png", ".svg", ".gif")):
            return f"{before}{source.replace('github.com', 'raw.githubusercontent.com')}/v{version}/{path}{after}"
        return f"{before}{source}/blob/v{version}/{path}{after}"

    text = (ROOT / "README.md").read_text("utf-8")
    return re.sub(r"""(\]\(|(?:src|href)=")([^)"\s#]+)([)"#\s])""", absolute, text)


if __name__ == "__main__":  # tests import what is above
    target_another_processor()
    everything = MODULE_SOURCES + CPU_SOURCES + CUDA_SOURCES + CUDA_MODULE_SOURCES
    setup(
        ext_modules=[Extension("nexus._native", everything)],
        cmdclass={"build_ext": BuildNative},
        long_description=readme(),
        long_description_content_type="text/markdown",
    )
