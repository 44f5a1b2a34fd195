"""`python tests/parity_table.py` writes docs/parity.md from the tests that carry the marker `parity`.

A row is a marker of a test, which runs both optimizers:

    @pytest.mark.parity("theme", "behaviour", torch="what torch's does", nexus="same", also=("test_x.py::test_y",))

A theme that is left out is the `THEME` of the file. `nexus` is "same", or what differs, and then `why` says the
reason. `also` names tests that show more of nexus's side: other backends, types, sizes.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "parity.md"
TORCH = "2.13"  # the version whose behaviour the rows state

THEMES = (
    "Arguments and errors",
    "Parameter groups",
    "Parameters and gradients",
    "The update",
    "Steps and state",
    "Rates and schedulers",
    "Hooks, closures, printing",
    "State dicts",
    "Copies",
    "GradScaler",
    "torch.compile",
    "Several processes",
)

INTRODUCTION = f"""\
# Parity with `torch.optim.AdamW(fused=True)`

What torch {TORCH}'s `torch.optim.AdamW(fused=True)` does on the CPU, and what `FusedAdamW` does. The first test of
each row runs both optimizers, and fails if one of them does something else than the row says; further tests show more
of `FusedAdamW`'s side. Values that are the "same" agree in float64 to a few units in the last place, since the two do
their operations in another order. `python tests/parity_table.py` writes this page from the tests.

"""


@dataclass(frozen=True)
class Row:
    test: str
    theme: str
    behaviour: str
    torch: str
    nexus: str = "same"
    why: str = ""
    also: tuple[str, ...] = ()

    def line(self) -> str:
        ours = self.nexus if not self.why else f"{self.nexus}. {self.why[0].upper()}{self.why[1:]}"
        tests = ", ".join(f"`{test}`" for test in (self.test, *self.also))
        return (
            "| " + " | ".join(cell.replace("|", r"\|") for cell in (self.behaviour, self.torch, ours, tests)) + " |"
        )


def rows(folder: Path = TESTS) -> list[Row]:
    """Every row, in the order of files and lines. Reads the sources: nothing is imported.

    Raises:
        ValueError: a marker is not of the form above.
    """
    found = []
    for file in sorted(folder.rglob("test_*.py"), key=lambda path: path.name):
        source = file.read_text("utf-8")
        if "pytest.mark.parity(" in source:
            theme = re.findall(r'^THEME = "(.*)"$', source, re.MULTILINE)
            for node in ast.parse(source).body:
                for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                    if "pytest.mark.parity" in ast.unparse(mark):
                        found.append(_row(f"{file.name}::{node.name}", mark, theme))
    return found


def _row(test: str, mark: ast.expr, theme: list[str]) -> Row:
    try:
        assert isinstance(mark, ast.Call)
        given = [ast.literal_eval(value) for value in mark.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in mark.keywords}
        return Row(test, *(theme if len(given) == 1 else []), *given, **named)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{test}: a parity marker has a theme, a behaviour and torch=; {error}") from error


def complaints(found: list[Row], folder: Path = TESTS) -> list[str]:
    """What is wrong with the rows, in words."""
    wrong = []
    seen: set[str] = set()
    paths = {path.name: path for path in folder.rglob("test_*.py")}
    for row in found:
        if row.theme not in THEMES:
            wrong.append(f"{row.test}: {row.theme!r} is no theme")
        if row.behaviour in seen:
            wrong.append(f"{row.test}: there is another row about {row.behaviour!r}")
        seen.add(row.behaviour)
        if not (row.behaviour and row.torch and row.nexus):
            wrong.append(f"{row.test}: an empty cell")
        if (row.nexus == "same") == bool(row.why):
            wrong.append(f"{row.test}: a row that differs says why, and one that is the same does not")
        for other in row.also:
            file, _, name = other.partition("::")
            if file not in paths or not re.search(rf"^def {name}\(", paths[file].read_text("utf-8"), re.MULTILINE):
                wrong.append(f"{row.test}: there is no {other}")
    wrong += [f"no row about {theme!r}" for theme in THEMES if theme not in {row.theme for row in found}]
    return wrong


def of_theme(found: Sequence[Row], theme: str) -> list[Row]:
    """The rows of a theme, those that differ first."""
    return sorted((row for row in found if row.theme == theme), key=lambda row: row.nexus == "same")


def page(found: Sequence[Row]) -> str:
    tables = []
    for theme in THEMES:
        lines = [row.line() for row in of_theme(found, theme)]
        head = f"## {theme}\n\n| | `torch.optim.AdamW(fused=True)` | `FusedAdamW` | shown by |\n|---|---|---|---|\n"
        tables.append(head + "\n".join(lines) + "\n")
    return INTRODUCTION + "\n".join(tables)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """For conftest.py: a test that has a row makes both optimizers, or its row states what nobody has looked at.

    With another torch than the rows are about, it is skipped.
    """
    if item.get_closest_marker("parity") is None:
        return (yield)
    import torch

    from nexus.optim import FusedAdamW

    if torch.__version__.split(".")[:2] != TORCH.split("."):
        pytest.skip(f"docs/parity.md is about torch {TORCH}; what another one does differently is no fault of nexus")
    kinds = {FusedAdamW: "FusedAdamW", torch.optim.AdamW: "torch.optim.AdamW(fused=True)"}
    missing = set(kinds.values())

    def noted(kind: Any) -> Callable[..., None]:
        init = kind.__init__

        @functools.wraps(init)
        def noting(self: Any, *args: Any, **options: Any) -> None:
            if kind is FusedAdamW or options.get("fused"):
                missing.discard(kinds[kind])
            init(self, *args, **options)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "__init__", noted(kind))
        result = yield
    assert not missing, f"{item.name} has a row in docs/parity.md and never makes {' or '.join(sorted(missing))}"
    return result


if __name__ == "__main__":
    found = rows()
    if wrong := complaints(found):
        sys.exit("\n".join(wrong))
    PAGE.write_text(page(found), "utf-8")
    print(f"{len(found)} rows in {PAGE}")
