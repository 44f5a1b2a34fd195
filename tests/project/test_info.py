"""`python -m nexus info`."""

import sys

import pytest
import torch

from nexus import __version__, backends
from nexus.__main__ import main


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    described = [word for name, _, detail in backends.describe() for word in (name, detail)]
    for words in (__version__, torch.__version__, "{}.{}".format(*sys.version_info[:2]), "threads", *described):
        assert words in out
