"""The docstrings of nexus as the site's Markdown: formulas, and the examples that doctest runs."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, Object


def as_markdown(text: str) -> str:
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r"^( *)\.\. math::\n\n?((?:\1 +\S.*\n?)+)", _formula, text, flags=re.MULTILINE)
    return re.sub(r"^( *)>>> (?:.*\n?)(?:\1\S.*\n?|\1 +\S.*\n?)*", _example, text, flags=re.MULTILINE)


def _formula(match: re.Match[str]) -> str:
    formula = textwrap.dedent(match[2]).rstrip()
    if r"\begin" not in formula and "&" in formula:  # several lines, aligned at each &
        formula = rf"\begin{{split}}{formula}\end{{split}}"
    return textwrap.indent(f"\n$$\n{formula}\n$$\n", match[1])


def _example(match: re.Match[str]) -> str:
    return textwrap.indent(f"\n```pycon\n{textwrap.dedent(match[0]).rstrip()}\n```\n", match[1])


class Docstrings(Extension):
    """Rewrites each docstring before mkdocstrings reads it."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
