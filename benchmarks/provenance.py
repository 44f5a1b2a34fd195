"""Where results come from and go to: the source's commit, the file's name. Needs no torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def commit() -> str | None:
    """Of the checkout that nexus is imported from; with a `+` if files have changed since.

    For a copy without its history, the environment's NEXUS_COMMIT says it.
    """
    if not (ROOT / ".git").exists():
        return os.environ.get("NEXUS_COMMIT") or None
    git = ["git", "-C", str(ROOT)]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=True, capture_output=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision.stdout.decode().strip() + "+" * bool(changes.stdout.strip())


def file_name(date: str, device: str) -> str:
    """`<date>_<device>.json`, of an ISO date with or without its time and of what the device calls itself."""
    name = device.lower().replace("(r)", "").replace("(tm)", "")
    return f"{date.partition('T')[0]}_{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
