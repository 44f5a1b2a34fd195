"""The code and the commands in docs/schedules run as they stand."""

import re
import shlex
from pathlib import Path

import pytest

from nexus.__main__ import main

PAGES = sorted((Path(__file__).parent.parent / "docs" / "schedules").glob("*.md"))
PYTHON = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S))
]
COMMANDS = [
    line
    for page in PAGES
    for line in re.findall(r"^python -m nexus (plot .*)$", page.read_text("utf-8"), re.M)
    if not line.endswith("--help")
]


def test_pages_were_found() -> None:
    assert [page.stem for page in PAGES] == ["README", "cosine", "sgdr", "wsd"]
    assert len(PYTHON) >= 5
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("code", PYTHON)
def test_code(code: str) -> None:
    exec(compile(code, "<docs>", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "schedules").mkdir(parents=True)
    if " -o " in command:
        pytest.importorskip("matplotlib")
    assert main(shlex.split(command)) == 0
    assert len(list(tmp_path.rglob("*.png"))) == (" -o " in command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
        assert (page.parent / target).is_file(), target
