"""What is shipped, and that it builds without torch."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import nexus

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = "_native" + sysconfig.get_config_var("EXT_SUFFIX")
BUILD_FAILURE = "nexus/_native_build_failure.txt"

pytestmark = pytest.mark.xdist_group("packaging")  # so that the copies below are made and built once


@pytest.fixture(scope="module")
def build_tools():
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler")


def copy_sources(destination):
    """Copy what a clone holds."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "_native_*_failure.txt")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, destination)
    for folder in ("csrc", "nexus", "tests"):
        shutil.copytree(ROOT / folder, destination / folder, ignore=built)
    return destination


def run(folder, *arguments, python=sys.executable, **variables):
    """Run Python in ``folder``, where nothing but ``variables`` steers the build."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEXUS_")}
    environment["NEXUS_CUDA_ARCHS"] = "sm_90"  # as the Makefile has it, so that its objects are taken over
    result = subprocess.run(
        [python, *arguments], cwd=folder, env=environment | variables, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(folder, kind, **variables):
    """Build the sdist, the wheel or the editable one in ``folder`` as pip does, and return its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    return folder / "dist" / run(folder, "-c", code, **variables).splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(build_tools, tmp_path_factory):
    """The sdist of a clone in which nexus has been built before."""
    clone = copy_sources(tmp_path_factory.mktemp("sources"))
    for built in ("build/native/x.ninja", "csrc/x.o", "tests/__pycache__/x", f"nexus/{EXTENSION}", BUILD_FAILURE):
        (clone / built).parent.mkdir(parents=True, exist_ok=True)
        (clone / built).touch()
    return build(clone, "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that is built from what the sdist holds. Objects compiled before are taken over where current."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    if (ROOT / "build" / "native").exists():
        shutil.copytree(ROOT / "build" / "native", tree / "build" / "native")
    return build(tree, "wheel", NEXUS_REQUIRE_NATIVE="1")


@pytest.fixture(scope="module")
def editable(build_tools, tmp_path_factory):
    """A clone named nexus, and the Python of an environment into which it is installed as by ``pip install -e``.

    Without the extension, which takes long to compile and plays no part in where nexus is found.
    """
    clone, environment = (tmp_path_factory.mktemp(name) / "nexus" for name in ("parent", "environment"))
    clone.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    packages = Path(run(clone, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')", python=python))
    with zipfile.ZipFile(build(copy_sources(clone), "editable", CXX="/nonexistent/c++")) as archive:
        archive.extractall(packages)
    # Its dependencies are those of the tests. Named in a .pth file, their folders' own such files are not obeyed, so
    # that no other install of nexus is seen.
    theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(theirs))
    return clone, python


def test_sdist_holds_the_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    expected |= {"LICENSE", "Makefile", "constraints.txt", "nexus/py.typed", "setup.py"}
    assert expected | {"tests/project/test_packaging.py"} <= names
    built = re.compile(r"\.(so|dylib|o|d|pyc|ninja)$|^build/|__pycache__|_failure\.txt$")
    assert not sorted(filter(built.search, names))


@pytest.mark.slow
def test_wheel_holds_the_extension_which_loads_without_torch_and_no_sources(wheel, tmp_path):
    information = f"nexus_optim-{nexus.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"nexus", information}
    package = tmp_path / "nexus"
    assert all((package / name).is_file() for name in (EXTENSION, "__init__.py", "py.typed"))
    assert not (tmp_path / BUILD_FAILURE).exists()
    metadata = (tmp_path / information / "METADATA").read_text("utf-8")
    assert re.findall(r"^Requires-Dist: (?!.*extra ==)(.*)$", metadata, re.MULTILINE) == ["torch>=2.10"]
    assert "License-Expression: BSD-3-Clause\n" in metadata
    told = run(tmp_path, "-c", "import nexus._native as n, sys; print(n.__file__, 'torch' in sys.modules)")
    assert told.split() == [str(package / EXTENSION), "False"]


ONE_STEP = """
import torch, nexus
from nexus.optim import FusedAdamW
weight = torch.nn.Parameter(torch.ones(1000))
weight.grad = torch.ones(1000)
optimizer = FusedAdamW([weight], lr=0.25, weight_decay=0.0)
optimizer.step()
print(nexus.__file__, optimizer.backend, weight[0].item())
"""


@pytest.mark.slow
def test_the_wheel_takes_a_step_where_there_is_no_compiler(wheel, tmp_path):
    """In an environment that holds the wheel and, in folders after it, what nexus depends on."""
    venv.create(tmp_path, symlinks=True)
    python = tmp_path / "bin" / "python"
    purelib = run(tmp_path, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')", python=python)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(purelib)
    theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(purelib, "dependencies.pth").write_text("\n".join(theirs))
    told = run(tmp_path, "-c", ONE_STEP, python=python, PATH="", PYTHONPATH="", PYTHONWARNINGS="error::UserWarning")
    file, backend, value = told.split()
    assert (file, backend, float(value)) == (f"{purelib}/nexus/__init__.py", "native", pytest.approx(0.75))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the clone's parent", "elsewhere"])
def test_an_editable_install_is_found_from_anywhere(editable, tmp_path_factory, place):
    """Where the clone's parent is searched first, too: the clone itself has the package's name, and is not it."""
    pytest.importorskip("mypy")
    clone, python = editable
    folder = clone.parent if place == "the clone's parent" else tmp_path_factory.mktemp("elsewhere")
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\n")  # which would take long

    def in_folder(*arguments):
        return run(folder, *arguments, python=python, PYTHONPATH="", MYPYPATH="")

    assert in_folder("-c", "import nexus; print(nexus.__file__)") == f"{clone / 'nexus' / '__init__.py'}\n"
    assert in_folder("-m", "nexus", "--version") == f"{nexus.__version__}\n"
    code = "import nexus.schedules; reveal_type(nexus.schedules.WSD)"
    types = in_folder("-m", "mypy", "--cache-dir", clone.with_name("mypy cache"), "-c", code)
    assert re.search(r'Revealed type is "def \(.*\) -> nexus\.schedules\.wsd\.WSD"', types), types


def test_build_knows_no_torch():
    include = re.compile(r"^\s*#\s*include\s*[<\"](torch|ATen|c10|caffe2)\b", re.MULTILINE)
    assert not [path for path in (ROOT / "csrc").rglob("*.*") if include.search(path.read_text())]
    (requirements,) = re.findall(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "pybind11" in requirements
    assert "torch" not in requirements


def test_installed_version_is_that_of_the_package():
    try:
        installed = importlib.metadata.version("nexus-optim")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("nexus runs from its source tree and is not installed")
    assert installed == nexus.__version__
