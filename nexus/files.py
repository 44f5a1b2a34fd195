"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Put what `write` writes at `path` in one atomic move, so that a failure half-way leaves what was there before.

    Raises:
        OSError: it cannot be written.
    """
    if path.exists() and not path.is_file():  # such as a folder, or /dev/null, which must not be replaced
        raise OSError("not a regular file")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
