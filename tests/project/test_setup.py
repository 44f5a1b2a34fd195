"""How setup.py builds, and what it does without a compiler, on a small extension and with scripts in nvcc's place."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
REASON_FILE, CUDA_REASON_FILE = "_native_build_failure.txt", "_native_cuda_failure.txt"
NO_COMPILER = "/nonexistent/c++"

# It notes how it was called, and compiles with the C++ compiler.
WORKING_NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_75; echo sm_80; echo sm_90; echo sm_120; exit; fi
echo "$@" >> calls
for argument; do
  shift
  case $argument in
    -gencode=* | -fmad=* | -Xfatbin=* | --threads=* | --forward-unknown-* | -ccbin=* | -cudart=*) ;;
    -Xcompiler=*) set -- "$@" $(echo "${argument#*=}" | tr , ' ') ;;
    *.cu) set -- "$@" -x c++ "$argument" ;;
    *) set -- "$@" "$argument" ;;
  esac
done
exec c++ "$@"
"""
CROSS_COMPILER = """#!/bin/sh
if [ "$1" = -dumpmachine ]; then echo aarch64-linux-gnu; exit; fi
exec c++ "$@"
"""
BROKEN_NVCC = "#!/bin/sh\necho broken today >&2\nexit 3\n"
FAILING_NVCC = '#!/bin/sh\nif [ "$1" = --list-gpu-code ]; then echo sm_90; else echo no licence; exit 1; fi\n'

MODULE = """
#include <Python.h>
#ifdef NEXUS_CUDA
int cuda_answer();
#else
static int cuda_answer() { return 0; }
#endif
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__native() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddIntConstant(m, "cuda_answer", cuda_answer());
  return m;
}
"""
CUDA_MODULE = """
#include <Python.h>
int kernel_answer();
int cuda_answer() { return sizeof NEXUS_CUDA_ARCHS > 1 ? kernel_answer() : -1; }
"""
KERNEL = "int kernel_answer() { return 42; }\n"


@pytest.fixture
def setup():
    """What setup.py defines."""
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location("nexus_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(setup, tmp_path):
    """A project that builds in a moment."""
    if os.name == "nt" or not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    files = {
        "csrc/python/module.cpp": MODULE,
        "csrc/python/cuda_module.cpp": CUDA_MODULE,
        "csrc/cuda/kernel.cu": KERNEL,
        "nexus/__init__.py": "__version__ = '0'\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def put_nvcc(folder, text):
    """Make ``text`` the nvcc of a toolkit, and return its CUDA_HOME."""
    nvcc = folder / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(text)
    nvcc.chmod(0o755)
    return str(folder / "cuda")


def build(tree, *options, nvcc=WORKING_NVCC, **variables):
    """Build in place, or as the options say, where nothing but ``variables`` steers the build."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "CUDA_"))}
    environment |= variables | {"CUDA_HOME": put_nvcc(tree, nvcc)}
    command = [sys.executable, "setup.py", "build_ext", *(options or ["--inplace"])]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


def succeed(*arguments, **variables):
    result = build(*arguments, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def answer(tree):
    """What the extension got from its CUDA part, or 0."""
    code = "import nexus._native; print(nexus._native.cuda_answer)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def calls(tree, word):
    return [line for line in (tree / "calls").read_text().splitlines() if word in line]


def gencode(numbers):
    """Code for each GPU, and PTX for those between and after them."""
    code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    ptx = sorted({numbers[0], numbers[-1]})
    return code + [f"-gencode=arch=compute_{number},code=compute_{number}" for number in ptx]


def test_everything_is_compiled_only_once(tree):
    succeed(tree)
    assert answer(tree) == 42
    assert not (tree / "nexus" / CUDA_REASON_FILE).exists()
    (call,) = calls(tree, "-c csrc/cuda/kernel.cu")
    assert [word for word in call.split() if word.startswith("-gencode")] == gencode([80, 90, 120])
    assert len(calls(tree, "-c csrc/python/cuda_module.cpp")) == 1
    assert "no work to do" in build(tree).stdout
    # With other flags nothing is current.
    succeed(tree, NEXUS_CUDA_ARCHS="sm_90")
    assert len(calls(tree, "-c csrc/cuda/kernel.cu")) == 2


def test_another_python_compiles_its_own_sources_alone(tree):
    succeed(tree)
    code = "import sys, sysconfig; sysconfig.get_config_vars()['SOABI'] = 'another'; sys.argv[0] = 'setup.py'; "
    code += "exec(compile(open('setup.py').read().replace('__file__', repr('setup.py')), 'setup.py', 'exec'))"
    environment = os.environ | {"CUDA_HOME": str(tree / "cuda")}
    for name in ("NEXUS_CUDA", "NEXUS_CUDA_ARCHS", "NEXUS_WERROR"):
        environment.pop(name, None)
    command = [sys.executable, "-c", code, "build_ext", "--inplace"]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True, timeout=120)
    assert len(calls(tree, "-c csrc/cuda/kernel.cu")) == 1
    assert len(calls(tree, "-c csrc/python/cuda_module.cpp")) == 2
    assert "no work to do" in build(tree).stdout  # the two do not undo each other's work


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="crosses from x86-64 on Linux")
def test_a_compiler_for_another_processor_makes_a_wheel_for_it(tree):
    """The stand-in only says that it compiles for aarch64; the names are what counts here."""
    compiler = tree / "aarch64-c++"
    compiler.write_text(CROSS_COMPILER)
    compiler.chmod(0o755)
    succeed(tree, "-b", "lib", "bdist_wheel", CXX=str(compiler), NEXUS_CUDA="0")
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-linux_aarch64.whl")
    with zipfile.ZipFile(wheel) as archive:
        extensions = [name for name in archive.namelist() if name.endswith(".so")]
    assert extensions == [f"nexus/{EXTENSION.replace('x86_64', 'aarch64')}"]
    assert "NEXUS_X86" not in next((tree / "build/native").rglob("build.ninja")).read_text()

    succeed(tree, "-b", "lib", "bdist_wheel", NEXUS_CUDA="0")
    assert any("-linux_x86_64" in wheel.name for wheel in (tree / "dist").glob("*.whl"))


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("", [80, 90, 120]),  # of the default ones those that this nvcc offers
        ("sm_90", [90]),
        (" sm_120,sm_75; sm_75", [75, 120]),
    ],
)
def test_code_is_made_for_each_gpu_and_ptx_for_others(setup, monkeypatch, tmp_path, archs, expected):
    monkeypatch.setenv("CUDA_HOME", put_nvcc(tmp_path, WORKING_NVCC))
    monkeypatch.setenv("NEXUS_CUDA_ARCHS", archs)
    monkeypatch.delenv("NEXUS_CUDA", raising=False)
    assert setup.find_cuda().flags().split() == gencode(expected)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NEXUS_CUDA": "yes"}, "NEXUS_CUDA is 'yes'; it has to be auto, 0 or 1"),
        ({"NEXUS_CUDA_ARCHS": "90"}, "NEXUS_CUDA_ARCHS holds '90'; it has to be a list such as 'sm_90 sm_120'"),
        ({"NEXUS_CUDA_ARCHS": "sm_90 native", "NEXUS_CUDA": "0"}, "NEXUS_CUDA_ARCHS holds 'native'"),
        ({"NEXUS_CUDA_ARCHS": "sm_90 sm_100"}, "holds 'sm_100'; {nvcc} offers sm_75, sm_80, sm_90, sm_120"),
        ({"nvcc": BROKEN_NVCC, "NEXUS_CUDA": "1"}, "broken today"),
        ({"nvcc": FAILING_NVCC, "NEXUS_CUDA": "1"}, "no licence"),
        ({"CXX": NO_COMPILER, "NEXUS_REQUIRE_NATIVE": "1"}, "no working C++ compiler"),
    ],
    ids=["cuda", "archs", "unneeded archs", "archs not offered", "broken nvcc", "failing nvcc", "no compiler"],
)
def test_wrong_settings_and_what_is_required_but_cannot_be_built_are_errors(tree, variables, words):
    result = build(tree, **variables)
    assert result.returncode != 0
    assert words.format(nvcc=tree / "cuda/bin/nvcc") in result.stderr
    assert not (tree / "nexus" / EXTENSION).exists()


def test_without_kernels_the_build_goes_on_and_says_why(tree):
    succeed(tree)
    for nvcc, variables, reason in (
        (WORKING_NVCC, {"NEXUS_CUDA": "0"}, "NEXUS_CUDA=0 was set when nexus was built"),
        (BROKEN_NVCC, {}, "broken today"),
        (FAILING_NVCC, {"NEXUS_CUDA": "auto"}, "no licence"),
        (WORKING_NVCC.replace("sm_", "sm_1"), {}, "nvcc compiles for none of sm_80, "),
    ):
        result = succeed(tree, nvcc=nvcc, NEXUS_REQUIRE_NATIVE="1", **variables)
        assert "warning: nexus is installed without its CUDA kernels" in result.stderr
        assert reason in (tree / "nexus" / CUDA_REASON_FILE).read_text()
        assert not (tree / "nexus" / REASON_FILE).exists()
        assert answer(tree) == 0
    succeed(tree)
    assert not (tree / "nexus" / CUDA_REASON_FILE).exists()
    assert answer(tree) == 42


@pytest.mark.parametrize(
    ("package", "options"), [("nexus", ["--inplace"]), ("lib/nexus", ["-b", "lib"])], ids=["in place", "for a wheel"]
)
def test_without_a_compiler_the_build_goes_on_and_says_why(tree, package, options):
    package = tree / package
    package.mkdir(parents=True, exist_ok=True)
    (package / EXTENSION).write_bytes(b"of an older source")
    result = succeed(tree, *options, CXX=NO_COMPILER)
    assert "warning: nexus is installed without its native extension" in result.stderr
    assert NO_COMPILER in (package / REASON_FILE).read_text()
    assert not (package / EXTENSION).exists()

    succeed(tree, *options)
    assert (package / EXTENSION).exists()
    assert not (package / REASON_FILE).exists()


def test_a_failed_compile_is_quoted(tree):
    (tree / "csrc" / "python" / "module.cpp").write_text("#error not today\n")
    succeed(tree)
    assert "not today" in (tree / "nexus" / REASON_FILE).read_text()


def test_a_missing_nvcc_is_said_to_be_missing(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name, path=None: None)
    monkeypatch.setenv("NEXUS_CUDA", "1")
    with pytest.raises(setup.CompileError, match=r"nvcc was not found .* install the CUDA toolkit or set CUDA_HOME"):
        setup.find_cuda()


def test_the_toolkit_of_cuda_home_comes_first(setup, monkeypatch, tmp_path):
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        monkeypatch.setenv(variable, put_nvcc(tmp_path / variable, WORKING_NVCC))
        assert setup.find_cuda().nvcc == str(tmp_path / variable / "cuda/bin/nvcc")
