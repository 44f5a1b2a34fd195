"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from references import BACKENDS

# Several pytest processes share the processors: threads that wait for one another while they take turns are slow.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // _workers))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20_240_404)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each way to run an update."""
    return request.param


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For a test that sets the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
