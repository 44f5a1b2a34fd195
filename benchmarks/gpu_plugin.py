"""A plugin of pytest: a test that never ends, or breaks CUDA for those after it, ends its process.

The log has the stack of each thread, or CUDA's error. pytest-xdist then replaces the worker, and other tests go on.
"""

import faulthandler
import os
import sys
from collections.abc import Generator

import pytest
import torch

SECONDS = float(os.environ.get("NEXUS_TEST_SECONDS", "60"))
STDERR = os.dup(sys.stderr.fileno())  # which pytest will capture


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=STDERR)
    try:
        result = yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # an error of a kernel is there for good
        return result
    except RuntimeError as error:
        os.write(STDERR, f"\n{item.nodeid} leaves this process without CUDA: {error}\n".encode())
        os._exit(1)
    finally:
        faulthandler.cancel_dump_traceback_later()
