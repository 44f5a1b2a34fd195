"""`python -m nexus info`."""

import sys

import pytest
import torch

from nexus import __version__, backends
from nexus.__main__ import main


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for words in (
        __version__,
        torch.__version__,
        f"{sys.version_info.major}.{sys.version_info.minor}",
        "threads",
    ):
        assert words in out
    for name, _, detail in backends.describe():
        assert name in out
        assert detail in out
