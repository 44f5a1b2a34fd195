"""How setup.py finds nvcc and what it does without it, on a small extension and with scripts in nvcc's place."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REASON_FILE, CUDA_REASON_FILE = "_native_build_failure.txt", "_native_cuda_failure.txt"

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
    (folder / "cuda" / "bin").mkdir(parents=True, exist_ok=True)
    (folder / "cuda" / "bin" / "nvcc").write_text(text)
    (folder / "cuda" / "bin" / "nvcc").chmod(0o755)
    return str(folder / "cuda")


def build(tree, nvcc, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NEXUS_", "CUDA_"))}
    environment |= variables | {"CUDA_HOME": put_nvcc(tree, nvcc)}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


def answer(tree):
    """What the extension got from its CUDA part, or 0."""
    code = "import nexus._native; print(nexus._native.cuda_answer)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def calls(tree, word):
    return [line for line in (tree / "calls").read_text().splitlines() if word in line]


def test_kernels_are_compiled_by_nvcc_and_only_once(tree):
    first = build(tree, WORKING_NVCC)
    assert first.returncode == 0, first.stdout + first.stderr
    assert answer(tree) == 42
    assert not (tree / "nexus" / CUDA_REASON_FILE).exists()
    assert len(calls(tree, "-c csrc/cuda/kernel.cu")) == 1
    assert len(calls(tree, "-c csrc/python/cuda_module.cpp")) == 1
    assert "no work to do" in build(tree, WORKING_NVCC).stdout
    # With other flags nothing is current.
    assert build(tree, WORKING_NVCC, NEXUS_CUDA_ARCHS="sm_90").returncode == 0
    assert len(calls(tree, "-c csrc/cuda/kernel.cu")) == 2


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("", [80, 90, 120]),  # of the default ones those that this nvcc offers
        ("sm_90", [90]),
        (" sm_120,sm_75; sm_75", [75, 120]),
    ],
)
def test_code_is_made_for_each_gpu_and_ptx_for_others(tree, archs, expected):
    result = build(tree, WORKING_NVCC, NEXUS_CUDA_ARCHS=archs)
    assert result.returncode == 0, result.stdout + result.stderr
    (call,) = calls(tree, "-c csrc/cuda/kernel.cu")
    code = [word.removeprefix("-gencode=") for word in call.split() if word.startswith("-gencode=")]
    assert code == [
        *(f"arch=compute_{number},code=sm_{number}" for number in expected),
        *(f"arch=compute_{number},code=compute_{number}" for number in sorted({expected[0], expected[-1]})),
    ]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"NEXUS_CUDA": "yes"}, "NEXUS_CUDA is 'yes'; it has to be auto, 0 or 1"),
        ({"NEXUS_CUDA_ARCHS": "90"}, "NEXUS_CUDA_ARCHS holds '90'; it has to be a list such as 'sm_90 sm_120'"),
        ({"NEXUS_CUDA_ARCHS": "sm_90 native", "NEXUS_CUDA": "0"}, "NEXUS_CUDA_ARCHS holds 'native'"),
        ({"NEXUS_CUDA_ARCHS": "sm_90 sm_100"}, "holds 'sm_100'; {nvcc} offers sm_75, sm_80, sm_90, sm_120"),
    ],
)
def test_wrong_settings_are_errors(tree, variables, words):
    result = build(tree, WORKING_NVCC, **variables)
    assert result.returncode != 0
    assert words.format(nvcc=tree / "cuda/bin/nvcc") in result.stderr


@pytest.mark.parametrize(
    ("nvcc", "variables", "reason"),
    [
        (WORKING_NVCC, {"NEXUS_CUDA": "0"}, "NEXUS_CUDA=0 was set when nexus was built"),
        (BROKEN_NVCC, {}, "broken today"),
        (FAILING_NVCC, {"NEXUS_CUDA": "auto"}, "no licence"),
        (WORKING_NVCC.replace("sm_", "sm_1"), {}, "nvcc compiles for none of sm_80, "),
    ],
    ids=["not wanted", "broken", "failing", "of another age"],
)
def test_without_kernels_the_build_goes_on_and_says_why(tree, nvcc, variables, reason):
    assert build(tree, WORKING_NVCC).returncode == 0
    result = build(tree, nvcc, NEXUS_REQUIRE_NATIVE="1", **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "warning: nexus is installed without its CUDA kernels" in result.stderr
    assert reason in (tree / "nexus" / CUDA_REASON_FILE).read_text()
    assert not (tree / "nexus" / REASON_FILE).exists()
    assert answer(tree) == 0

    assert build(tree, WORKING_NVCC).returncode == 0
    assert not (tree / "nexus" / CUDA_REASON_FILE).exists()
    assert answer(tree) == 42


@pytest.mark.parametrize(("nvcc", "words"), [(BROKEN_NVCC, "broken today"), (FAILING_NVCC, "no licence")])
def test_required_kernels_that_cannot_be_built_are_an_error(tree, nvcc, words):
    result = build(tree, nvcc, NEXUS_CUDA="1")
    assert result.returncode != 0
    assert words in result.stderr
    assert not (tree / "nexus" / ("_native" + sysconfig.get_config_var("EXT_SUFFIX"))).exists()


def test_a_missing_nvcc_is_said_to_be_missing(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name, path=None: None)
    monkeypatch.setenv("NEXUS_CUDA", "1")
    with pytest.raises(setup.CompileError, match=r"nvcc was not found .* install the CUDA toolkit or set CUDA_HOME"):
        setup.find_cuda()


def test_the_toolkit_of_cuda_home_comes_first(setup, monkeypatch, tmp_path):
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, put_nvcc(tmp_path / variable, WORKING_NVCC))
        assert setup.find_cuda().nvcc == str(tmp_path / variable / "cuda/bin/nvcc")
