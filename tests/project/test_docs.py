"""What the documentation shows runs as it stands, and what it names exists."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from gpt.cli import main as gpt_main

from benchmarks.__main__ import main as benchmarks_main
from nexus import schedules
from nexus.__main__ import COMMANDS, main
from nexus.plot_command import KINDS
from nexus.schedules import Schedule

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/README.md", "docs/**/*.md"]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for page in PAGES for path in sorted(ROOT.glob(page))
}

# What the words around a snippet take for granted.
GIVEN = {
    "docs/demo.md": "import torch; from nexus.optim import FusedAdamW; from nexus.schedules import WSD\n"
    "groups = torch.nn.Linear(2, 2).parameters()",
}


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of these languages."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for language, code in fences if language in languages]


def commands(text: str, start: str) -> list[str]:
    """Commands beginning with `start`, one on a line of a shell block or in backticks; without their comments."""
    lines = [line for block in blocks(text, "sh", "bash", "") for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    parts = [part.strip() for line in (*lines, *spans) for part in line.split("  #")[0].split("&&")]
    return [part for part in parts if part.startswith(start)]


PROGRAMS = {"python -m nexus": main, "python -m benchmarks": benchmarks_main, "python examples/gpt": gpt_main}
SHOWN = [(program, command) for text in TEXTS.values() for program in PROGRAMS for command in commands(text, program)]


def test_there_is_something_to_test() -> None:
    snippets = {name: len(blocks(text, "python")) for name, text in TEXTS.items()}
    assert snippets["README.md"] >= 1
    assert snippets["docs/optimizer.md"] >= 5
    assert sum(count for name, count in snippets.items() if name.startswith("docs/schedules/")) >= 5
    assert sum(command.startswith("python -m nexus plot") for _, command in SHOWN) >= 6
    assert len(commands(TEXTS["CONTRIBUTING.md"], "python -m pytest")) >= 4


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own
@pytest.mark.parametrize("name", [name for name, text in TEXTS.items() if blocks(text, "python")])
def test_code(name, tmp_path, monkeypatch) -> None:
    """The snippets of a page, one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    variables: dict[str, object] = {"__name__": "__main__"}
    for code in (GIVEN.get(name, ""), *blocks(TEXTS[name], "python")):
        try:
            exec(compile(code, name, "exec"), variables)
        except ModuleNotFoundError as error:
            if error.name not in ("accelerate", "lightning", "transformers"):
                raise
            pytest.skip(f"{error.name} is not installed")


def test_the_first_code_prints_what_the_readme_shows(capsys) -> None:
    code, (shown, *_) = blocks(TEXTS["README.md"], "python")[0], blocks(TEXTS["README.md"], "text")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed, expected = (re.split(r"([\d.]+)", text) for text in (capsys.readouterr().out, shown))
    assert printed[::2] == expected[::2]
    assert list(map(float, printed[1::2])) == pytest.approx(list(map(float, expected[1::2])), abs=0.01)


@pytest.mark.parametrize(("program", "command"), dict.fromkeys(SHOWN))
def test_command(program, command, tmp_path, monkeypatch, capsys) -> None:
    """Plots are drawn; of every other command, the options are looked up in its help."""
    arguments = shlex.split(command.removeprefix(program))
    if arguments[:1] == ["plot"] and "--help" not in arguments and "…" not in command:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "docs" / "schedules").mkdir(parents=True)
        if "-o" in arguments:
            pytest.importorskip("matplotlib")
        assert main(arguments) == 0
        assert len(list(tmp_path.rglob("*.png"))) == ("-o" in arguments)
        return
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program]([*(word for word in arguments[:1] if word in COMMANDS), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in arguments if word.startswith("-") and word not in text] == []


def test_the_gallery_has_each_class() -> None:
    found = {name: getattr(schedules, name) for name in schedules.__all__}
    classes = [name for name, each in found.items() if isinstance(each, type) and issubclass(each, Schedule)]
    assert [name for name in classes if f"`{name}(" not in TEXTS["docs/schedules/gallery.md"]] == ["Schedule"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gallery_has_each_family(kind: str) -> None:
    """The class with its arguments, the phases and the picture, which one of the pages says how to draw."""
    gallery = TEXTS["docs/schedules/gallery.md"]
    assert f"`{type(KINDS[kind]).__name__}(" in gallery
    assert f"]({kind}.png)" in gallery
    drawn = [command for _, command in SHOWN if command.startswith(f"python -m nexus plot {kind} ")]
    assert any(command.endswith(f"-o docs/schedules/{kind}.png") for command in drawn)


@pytest.mark.parametrize("name", TEXTS)
def test_what_a_page_names_exists(name: str) -> None:
    """Targets of make, tests, links, pictures, and each path in backticks with a folder or a source file's suffix."""
    text, folder = TEXTS[name], (ROOT / name).parent
    targets = set(re.findall(r"^([a-z.]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for command in commands(text, "make "):
        wanted = [word for word in shlex.split(command)[1:] if "=" not in word]
        assert set(wanted) <= targets, command
    for command in commands(text, "python -m pytest"):
        for path in shlex.split(command)[3:]:
            assert list(ROOT.glob(path)), f"{command}: {path}"
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert folder.joinpath(target).is_file(), target
    for span in re.findall(r"`([\w./-]+(?:\.py|\.pyi|\.h|\.cpp|\.md|\.toml|/))`", text):
        places = (ROOT / span, ROOT / "csrc" / span, ROOT / "csrc" / "cpu" / span, folder / span)
        assert any(place.exists() for place in places), span


def test_checklists_name_what_exists() -> None:
    """A name in backticks that looks like one of the code's occurs in the sources."""
    sources = "\n".join(
        path.read_text("utf-8")
        for folder, suffix in (("nexus", "py"), ("tests", "py"), ("csrc", "h"), ("csrc", "cpp"))
        for path in (ROOT / folder).rglob(f"*.{suffix}")
        if path != Path(__file__).resolve()
    )
    for span in re.findall(r"`([A-Za-z_]\w+)(?:\(\))?`", TEXTS["CONTRIBUTING.md"]):
        assert re.search(rf"\b{span}\b", sources) or (ROOT / span).exists(), span
