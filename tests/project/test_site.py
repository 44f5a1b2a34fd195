"""The documentation's site: each page has a place, each public name is in the reference, the notebook runs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIG = (ROOT / "mkdocs.yml").read_text("utf-8")
MODULES = ("nexus.optim", "nexus.schedules", "nexus.schedules.imports", "nexus.training", "nexus.training.schedulers")
NOTEBOOKS = sorted(DOCS.rglob("*.ipynb"))


def notebook_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebook", DOCS / "site" / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_is_in_the_navigation() -> None:
    listed = re.findall(r"[\w/-]+\.md$", CONFIG[CONFIG.index("\nnav:") :], re.MULTILINE)
    pages = [path.relative_to(DOCS) for suffix in ("*.md", "*.ipynb") for path in DOCS.rglob(suffix)]
    assert {path.with_suffix(".md").as_posix() for path in pages} <= set(listed)
    assert len(listed) == len(set(listed))


def test_the_address_is_that_of_the_package() -> None:
    metadata = (ROOT / "pyproject.toml").read_text("utf-8")
    urls = dict(re.findall(r'^(Source|Documentation) = "(.*)"$', metadata, re.MULTILINE))
    assert f"repo_url: {urls['Source']}\n" in CONFIG
    assert f"site_url: {urls['Documentation']}\n" in CONFIG


@pytest.mark.parametrize("name", MODULES)
def test_the_reference_has_each_public_name(name: str) -> None:
    module: Any = importlib.import_module(name)
    public = getattr(module, "__all__", None) or [
        each for each, value in vars(module).items() if isinstance(value, type) and value.__module__ == name
    ]
    text = "\n".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    written = set(re.findall(r"^::: nexus\S*\.(\w+)$", text, re.MULTILINE))
    assert {each for each in public if each[0] != "_"} <= written


def test_the_reference_names_what_exists() -> None:
    for page in (DOCS / "reference").glob("*.md"):
        for module, name in re.findall(r"^::: (\S+)\.(\w+)$", page.read_text("utf-8"), re.MULTILINE):
            if "integrations" in module:  # which imports the package that it integrates
                source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text("utf-8")
                assert f"\nclass {name}(" in source
            else:
                assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_prints(path: Path) -> None:
    """With other numbers, perhaps. docs/site/notebook.py writes the outputs anew."""
    torch.manual_seed(0)
    notebook = json.loads(path.read_text("utf-8"))
    shown = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]

    def texts(outputs: list[dict[str, Any]]) -> list[str]:
        return [re.sub(r"[\d.]+(e-?\d+)?", "#", "".join(each.get("text", ["a picture"]))) for each in outputs]

    assert [texts(outputs) for outputs in notebook_runner().run(notebook)] == [texts(outputs) for outputs in shown]
    links = re.findall(r"\]\(([^)#:]+)", "".join("".join(cell["source"]) for cell in notebook["cells"]))
    assert links
    assert all((path.parent / link).is_file() for link in links)
