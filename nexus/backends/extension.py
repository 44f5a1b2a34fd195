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
    """Why the extension is not there: the compiler's words, where the install wrote them down."""
    if extension is not None:
        if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            return None
        return (
            f"torch {torch.__version__} is too old: 2.10 is the first with DLPack's C exchange functions; update it"
        )
    failure = Path(__file__).parents[1] / "_native_build_failure.txt"
    if failure.is_file():
        return f"the extension was not built: {failure.read_text().strip()}"
    reason = f"the extension cannot be imported: {_import_error}"
    if (Path(__file__).parents[2] / "setup.py").is_file():
        reason += (
            ". This is nexus's source tree: run 'pip install -e .' or 'make build' in it, or leave its folder to "
            "use an installed nexus"
        )
    return reason
