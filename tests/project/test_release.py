"""What is published: its addresses, its version, and the wheels that release/ builds."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import nexus

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "https://github.com/nexus-optim/nexus"
ITS_RUN = {
    "GITHUB_SERVER_URL": "https://github.com",
    "GITHUB_REPOSITORY": "nexus-optim/nexus",
    "GITHUB_REF_NAME": f"v{nexus.__version__}",
}


def load(path):
    """A Python file outside all packages, as a module."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup():
    pytest.importorskip("setuptools")
    return load(ROOT / "setup.py")


def test_one_address_everywhere():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^Source = "(.*)"$', text, re.MULTILINE) == [SOURCE]
    (site,) = re.findall(r'^Documentation = "(.*)"$', text, re.MULTILINE)
    files = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "mkdocs.yml")]
    files += [*(ROOT / "docs").rglob("*.md"), *(ROOT / "nexus").rglob("*.py"), *(ROOT / ".github").rglob("*.yml")]
    for file in files:
        for address in re.findall(r"https?://[\w./-]*nexus-optim[\w./-]*", file.read_text("utf-8")):
            known = address.startswith((SOURCE, site.rstrip("/"), "https://pypi.org/project/nexus-optim"))
            assert known, f"{file.relative_to(ROOT)} has {address}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"GITHUB_REPOSITORY": "someone/nexus"}, "this is https://github.com/someone/nexus, and pyproject.toml says"),
        ({"GITHUB_REF_NAME": "v0.0.0"}, f"the tag is v0.0.0, and nexus.__version__ is {nexus.__version__}"),
        ({"GITHUB_REF_NAME": nexus.__version__}, f"the tag has to be v{nexus.__version__}"),
    ],
    ids=["meant", "a fork", "another version", "no v"],
)
def test_only_a_release_that_is_meant_is_published(change, words):
    command = [sys.executable, ROOT / "release" / "may_publish.py"]
    result = subprocess.run(command, env=os.environ | ITS_RUN | change, capture_output=True, text=True)
    assert result.returncode == (words is not None), result.stderr
    assert (words or "") in result.stderr


def test_a_release_is_in_the_changelog(monkeypatch, tmp_path):
    may_publish = load(ROOT / "release" / "may_publish.py")
    for name in ("pyproject.toml", "nexus/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n")
    monkeypatch.setattr(may_publish, "ROOT", tmp_path)
    (problem,) = may_publish.problems(ITS_RUN)
    assert problem == f"CHANGELOG.md has no heading '## [{nexus.__version__}] - DATE'"


def test_every_link_of_the_index_page_is_an_address_of_a_file_that_exists(setup):
    text = setup.readme()
    blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)", blocks) + re.findall(r'(?:src|href)="([^"]+)"', blocks)
    assert len(links) > 10
    raw = SOURCE.replace("github.com", "raw.githubusercontent.com")
    for link in links:
        assert link.startswith(("https://", "#")), link
        for base in (f"{SOURCE}/blob/v{nexus.__version__}/", f"{raw}/v{nexus.__version__}/"):
            if link.startswith(base):
                assert (ROOT / link.removeprefix(base).partition("#")[0]).exists(), link
    # Nothing else has changed.
    back = text.replace(f"{SOURCE}/blob/v{nexus.__version__}/", "").replace(f"{raw}/v{nexus.__version__}/", "")
    assert back == (ROOT / "README.md").read_text("utf-8")


def test_links_in_the_readme(setup, monkeypatch, tmp_path):
    """Of every kind: a page, a place in it, a picture in a link and in HTML; other addresses and code stay."""
    for name in ("pyproject.toml", "nexus/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("docs/a.md", "docs/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    before = (
        '[a](docs/a.md) [b](docs/a.md#place "title") [![c](docs/b.png)](docs/) <img src="docs/b.png" width="9"> '
        "[d](https://pytorch.org/docs/a.md) [e](#place) `steps[0](x)`"
    )
    (tmp_path / "README.md").write_text(before)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    blob = f"{SOURCE}/blob/v{nexus.__version__}"
    raw = f"https://raw.githubusercontent.com/nexus-optim/nexus/v{nexus.__version__}"
    assert setup.readme() == (
        f'[a]({blob}/docs/a.md) [b]({blob}/docs/a.md#place "title") [![c]({raw}/docs/b.png)]({blob}/docs/) '
        f'<img src="{raw}/docs/b.png" width="9"> [d](https://pytorch.org/docs/a.md) [e](#place) `steps[0](x)`'
    )


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("c++"), reason="needs a compiler on Linux")
def test_a_name_that_no_library_has_is_found(tmp_path):
    """The extension may ask for what Python has, and for names with a version: what is left would fail at import."""
    wheels = load(ROOT / "release" / "wheels.py")
    wheel = tmp_path / "x.whl"
    for call in ("PyLong_FromLong(1)", "printf()", "not_in_this_glibc()"):
        source = f'extern "C" int {call.replace("1", "long")};\nint f() {{ return {call}; }}\n'
        (tmp_path / "x.cpp").write_text(source)
        command = ["c++", "-shared", "-fPIC", tmp_path / "x.cpp", "-o", tmp_path / "x.so"]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(tmp_path / "x.so", "x.so")
        if call.startswith("not"):
            with pytest.raises(SystemExit, match=r"x.whl: no library of glibc 2.28 has not_in_this_glibc"):
                wheels.check_names(wheel)
        else:
            wheels.check_names(wheel)


def test_the_workflow_builds_for_every_python_that_is_promised():
    project = (ROOT / "pyproject.toml").read_text()
    promised = re.findall(r"Python :: 3\.(\d+)\"", project)
    (built,) = re.findall(r'^build = "(cp.*)"$', project, re.MULTILINE)
    assert built.split() == [f"cp3{minor}-*" for minor in promised]
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    (systems,) = re.findall(r"os: \[(.*)\]", workflow)
    (count,) = re.findall(r"wc -l\)\" = (\d+)", workflow)
    assert int(count) == len(promised) * len(systems.split(","))
