"""The compiled extension, `None` where it is not there, and why it is not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

__all__ = ["extension", "unavailable"]

try:
    from nexus import _native as extension
except ImportError as error:
    extension = None  # type: ignore[assignment]
    _import_error = str(error)


def unavailable(devices: Iterable[torch.device] = ()) -> str | None:
    """Why the extension is not there, in the compiler's words where the install wrote them down; and what to do."""
    if extension is not None:
        if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            return None
        return (
            f"torch {torch.__version__} is too old: 2.10 is the first with DLPack's C exchange functions; update it"
        )
    failure = Path(__file__).parents[1] / "_native_build_failure.txt"
    clone = Path(__file__).parents[2]
    in_clone = (clone / "setup.py").is_file()
    install = f"pip install --no-cache-dir --force-reinstall --no-deps {f'-e {clone}' if in_clone else 'nexus-optim'}"
    if failure.is_file():
        words = failure.read_text().strip().removesuffix(".")
        return (
            f"the extension was not built: {words}. With a C++ compiler installed (g++ or clang++), run '{install}'; "
            "without --no-cache-dir, pip may take its own copy, which has no extension"
        )
    if in_clone:
        return (
            f"the extension cannot be imported: {_import_error}. This is nexus's source tree ({clone}): run "
            "'pip install -e .' or 'make build' in it, or leave its folder to use an installed nexus"
        )
    return f"the extension cannot be imported: {_import_error}. Run '{install}'"
