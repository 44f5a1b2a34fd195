"""What MkDocs lacks: pages from outside of docs/, links to files there, formulas without a script, notebooks."""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]

# Pages of the site that lie elsewhere in the repository, and where the site has them.
MIRRORED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
ORIGINS = {page: origin for origin, page in MIRRORED.items()}


def on_files(files: Any, config: Any) -> Any:
    for origin, page in MIRRORED.items():
        files.append(File.generated(config, page, content=(ROOT / origin).read_text("utf-8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        for name, content in pages_of(notebook.src_uri, json.loads(notebook.content_string)):
            files.append(File.generated(config, name, content=content))
    return files


def pages_of(uri: str, notebook: dict[str, Any]) -> list[tuple[str, str | bytes]]:
    """A notebook's page in Markdown, then its pictures."""
    stem = uri.removesuffix(".ipynb")
    parts: list[str] = []
    pictures: list[tuple[str, str | bytes]] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", [])})
            if "image/png" in data:
                pictures.append((f"{stem}-{len(pictures)}.png", base64.b64decode("".join(data["image/png"]))))
                parts.append(f"![]({posixpath.basename(pictures[-1][0])})")
            else:
                parts.append("```text\n" + "".join(data["text/plain"]).rstrip("\n") + "\n```")
    return [(f"{stem}.md", "\n\n".join(parts) + "\n"), *pictures]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A relative link that is right in the repository is made right in the site."""
    uri = page.file.src_uri
    folder = posixpath.dirname(ORIGINS.get(uri, f"docs/{uri}"))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match["path"]))
        if target in MIRRORED:
            target = f"docs/{MIRRORED[target]}"
        elif not (ROOT / target).exists():
            return match[0]  # MkDocs says what is wrong with it
        if target.startswith("docs/"):
            path = posixpath.relpath(target, posixpath.dirname(f"docs/{uri}"))
        else:
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            path = f"{config.repo_url.rstrip('/')}/{kind}/main/{target}"
        return f"]({path}{match['anchor'] or ''})"

    return re.sub(r"\]\((?P<path>(?!\w+:)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)", moved, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    r"""A formula in LaTeX becomes MathML; a `\|` of a table's code becomes what it stands for, as on GitHub."""
    inline = r'<span class="arithmatex">\\\((.*?)\\\)</span>'
    block = r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>'
    content = re.sub(inline, lambda each: convert(html.unescape(each[1])), content, flags=re.DOTALL)
    content = re.sub(block, lambda each: _formula(html.unescape(each[1])), content, flags=re.DOTALL)
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace("\\|", "|"), content, flags=re.DOTALL)


def _formula(tex: str) -> str:
    mathml = re.sub(r'columnalign="(\w+)"', r'style="text-align: \1"', convert(tex, display="block"))
    return f'<div class="formula">{mathml}</div>'


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Everything that a page needs is on the site itself."""
    source = r'<(?:script|img)[^>]* src="https?:[^>]*>'
    sheet = r'<link[^>]*"(?:stylesheet|preconnect)"[^>]*https?:[^>]*>'
    found = re.search(f"{source}|{sheet}", output)
    if found:
        raise ValueError(f"{page.file.src_uri} fetches something from elsewhere: {found[0]}")
    return output
