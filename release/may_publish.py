"""Stops a release that was not meant: of another repository, another version, or without its changelog.

The release workflow runs it on a tag, before it builds anything.
"""

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def only(pattern: str, path: str) -> str:
    """What the one match of a pattern in a file holds."""
    (found,) = re.findall(pattern, (ROOT / path).read_text("utf-8"), re.MULTILINE)
    return found


def problems(environment: Mapping[str, str]) -> list[str]:
    """Why this checkout may not be published from this workflow run."""
    source = only(r'^Source = "(.*)"$', "pyproject.toml")
    version = only(r'^__version__ = "(.*)"$', "nexus/__init__.py")
    here = f"{environment.get('GITHUB_SERVER_URL')}/{environment.get('GITHUB_REPOSITORY')}"
    tag = environment.get("GITHUB_REF_NAME")
    found = []
    if here != source:
        found.append(f"this is {here}, and pyproject.toml says that nexus lives at {source}")
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and nexus.__version__ is {version}: the tag has to be v{version}")
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        found.append(f"CHANGELOG.md has no heading '## [{version}] - DATE'")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(os.environ)) or None)
