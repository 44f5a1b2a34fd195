"""What is shipped, and that it builds without torch and installs without a compiler."""

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
REASON_FILE, CUDA_REASON_FILE = "_native_build_failure.txt", "_native_cuda_failure.txt"

pytestmark = pytest.mark.xdist_group("packaging")  # so that the copies below are made and built once


@pytest.fixture(scope="module")
def build_tools():
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        pytest.skip("no C++ compiler")


def copy_sources(destination):
    """Copy what a clone holds, and the objects compiled so far: ninja takes over those that are current."""
    built = shutil.ignore_patterns("__pycache__", "*.so", REASON_FILE, CUDA_REASON_FILE)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, destination)
    for folder in ("csrc", "nexus", "tests"):
        shutil.copytree(ROOT / folder, destination / folder, ignore=built)
    if (ROOT / "build" / "native").exists():
        shutil.copytree(ROOT / "build" / "native", destination / "build" / "native")
    return destination


@pytest.fixture
def tree(build_tools, tmp_path):
    return copy_sources(tmp_path)


def run(folder, *arguments, python=sys.executable, **variables):
    """Run Python in ``folder``, where nothing but ``variables`` steers the build."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEXUS_")}
    environment["NEXUS_CUDA_ARCHS"] = "sm_90"  # as the Makefile has it, so that its objects are taken over
    return subprocess.run(
        [python, *arguments],
        cwd=folder,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(folder, kind):
    """Build the sdist, the wheel or the editable one in ``folder`` as pip does, and return its path."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    result = run(folder, "-c", code, NEXUS_REQUIRE_NATIVE="1")
    assert result.returncode == 0, result.stdout + result.stderr
    return folder / "dist" / result.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(build_tools, tmp_path_factory):
    return build(copy_sources(tmp_path_factory.mktemp("sources")), "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel that is built from what the sdist holds."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    if (ROOT / "build" / "native").exists():
        shutil.copytree(ROOT / "build" / "native", tree / "build" / "native")
    return build(tree, "wheel")


@pytest.fixture(scope="module")
def editable(build_tools, tmp_path_factory):
    """A clone named nexus, and the Python of an environment into which it is installed as by ``pip install -e``."""
    clone, environment = (tmp_path_factory.mktemp(name) / "nexus" for name in ("parent", "environment"))
    clone.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    where = run(clone, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')", python=python)
    packages = Path(where.stdout)
    with zipfile.ZipFile(build(copy_sources(clone), "editable")) as archive:
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
    expected |= {
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "nexus/py.typed",
        "setup.py",
        "tests/project/test_packaging.py",
    }
    assert expected <= names
    built = re.compile(r"\.(so|dylib|o|d|pyc|ninja)$|^build/|__pycache__|_failure\.txt$")
    assert not sorted(filter(built.search, names))


@pytest.mark.slow
def test_wheel_holds_the_extension_and_no_sources(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"nexus_optim-{nexus.__version__}.dist-info/METADATA").decode()
    assert {f"nexus/{EXTENSION}", "nexus/__init__.py", "nexus/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {
        "nexus",
        f"nexus_optim-{nexus.__version__}.dist-info",
    }
    assert f"nexus/{REASON_FILE}" not in names
    assert re.findall(r"^Requires-Dist: (?!.*extra ==)(.*)$", metadata, re.MULTILINE) == ["torch>=2.10"]
    assert "License-Expression: BSD-3-Clause\n" in metadata


@pytest.mark.slow
def test_extension_of_the_wheel_loads_without_torch(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    result = run(tmp_path, "-c", "import nexus._native as n, sys; print(n.__file__, 'torch' in sys.modules)")
    assert result.stdout.split() == [str(tmp_path / "nexus" / EXTENSION), "False"], result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the clone's parent", "elsewhere"])
def test_an_editable_install_is_found_from_anywhere(editable, tmp_path_factory, place):
    """Where the clone's parent is searched first, too: the clone itself has the package's name, and is not it."""
    pytest.importorskip("mypy")
    clone, python = editable
    folder = clone.parent if place == "the clone's parent" else tmp_path_factory.mktemp("elsewhere")

    def in_folder(*arguments):
        result = run(folder, *arguments, python=python, PYTHONPATH="", MYPYPATH="")
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert in_folder("-c", "import nexus; print(nexus.__file__)") == f"{clone / 'nexus' / '__init__.py'}\n"
    assert in_folder("-m", "nexus", "--version") == f"{nexus.__version__}\n"
    types = in_folder(
        *("-m", "mypy", "--cache-dir", clone.with_name("mypy cache")),
        *("-c", "import nexus.optim; reveal_type(nexus.optim.FusedAdamW)"),
    )
    assert re.search(r'Revealed type is "def \(.*\) -> nexus\.optim\.fused_adamw\.FusedAdamW"', types), types


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


def test_importing_nexus_does_not_import_torch():
    result = run(ROOT, "-c", "import nexus, sys; print('torch' in sys.modules)")
    assert result.stdout == "False\n", result.stderr


def test_build_is_incremental(tree):
    first = run(tree, "setup.py", "build_ext", "--inplace", NEXUS_REQUIRE_NATIVE="1")
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tree / "nexus" / EXTENSION).exists()
    again = run(tree, "setup.py", "build_ext", "--inplace", NEXUS_REQUIRE_NATIVE="1")
    assert "no work to do" in again.stdout


@pytest.mark.parametrize("place", ["in place", "for a wheel"])
def test_without_a_compiler_the_build_goes_on_and_says_why(tree, place):
    package, options = (tree / "nexus", ["--inplace"]) if place == "in place" else (tree / "lib/nexus", ["-b", "lib"])
    package.mkdir(parents=True, exist_ok=True)
    (package / EXTENSION).write_bytes(b"of an older source")
    result = run(tree, "setup.py", "build_ext", *options, CXX="/nonexistent/c++")
    assert result.returncode == 0
    assert "warning: nexus is installed without its native extension" in result.stderr
    assert "/nonexistent/c++" in (package / REASON_FILE).read_text()
    assert not (package / EXTENSION).exists()

    result = run(tree, "setup.py", "build_ext", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (package / EXTENSION).exists()
    assert not (package / REASON_FILE).exists()


def test_a_failed_compile_is_quoted(tree):
    (tree / "csrc" / "python" / "module.cpp").write_text("#error not today\n")
    result = run(tree, "setup.py", "build_ext", "--inplace")
    assert result.returncode == 0
    assert "not today" in (tree / "nexus" / REASON_FILE).read_text()


def test_a_required_extension_that_cannot_be_built_is_an_error(tree):
    result = run(tree, "setup.py", "build_ext", "--inplace", CXX="/nonexistent/c++", NEXUS_REQUIRE_NATIVE="1")
    assert result.returncode != 0
    assert "no working C++ compiler" in result.stderr
