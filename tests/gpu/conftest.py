"""Fixtures for tests that need a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def sync_debug_mode() -> Iterator[Callable[[str], None]]:
    """Sets what a wait for the device does, for one test."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")
