"""A plugin of pytest: a test that takes too long ends its process, with the stack of each thread in the log.

A worker of pytest-xdist is then replaced, and the other tests go on, also where a kernel never ends.
"""

import faulthandler
import os
import sys
from collections.abc import Generator

import pytest

SECONDS = float(os.environ.get("NEXUS_TEST_SECONDS", "60"))
STDERR = os.dup(sys.stderr.fileno())  # which pytest will capture


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=STDERR)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
