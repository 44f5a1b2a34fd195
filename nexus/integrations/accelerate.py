"""What Hugging Face accelerate puts in the place of an optimizer's `step`. Imports no accelerate."""

from __future__ import annotations

from typing import Any


def is_watched(step: Any) -> bool:
    """Whether `step`, found on an optimizer, is accelerate's, which takes a step for skipped if nobody calls it."""
    return getattr(step, "__module__", None) == "accelerate.optimizer"
