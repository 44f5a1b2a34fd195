"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from importlib.util import find_spec

# Before torch is imported, and inherited by processes that tests start: without it, MKL's matrix products may differ
# in their last bits with the alignment of their inputs, and many tests compare the bits of two runs of a model.
os.environ.setdefault("MKL_CBWR", "AUTO")

import pytest
import torch

# Of a background job of a shell, SIGINT is ignored, and so it would be of the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():  # before Triton is imported: without a GPU, its kernels run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cuda_on_cpu import shim  # registers its backend; imports nexus
from cuda_shim.controls import Shim
from graphs_on_cpu import graphs  # noqa: F401  # a fixture
from parity_table import pytest_runtest_call  # noqa: F401  # a hook
from references import BACKENDS, EVERY_BACKEND, GPU_BACKENDS, tensors_where_it_runs
from worlds import Worlds

from nexus.backends import triton

# Several pytest processes share the processors: threads that wait for one another while they take turns are slow.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // _workers))


SOME_TESTS_NEED = ("accelerate", "expecttest", "lightning", "matplotlib", "mypy", "tqdm", "transformers", "triton")
MISSING = ", ".join(name for name in SOME_TESTS_NEED if find_spec(name) is None)


def pytest_configure() -> None:
    if MISSING and os.environ.get("CI") in ("1", "true"):
        raise pytest.UsageError(f"in CI no test may be skipped, but these packages are not installed: {MISSING}")


def pytest_report_header() -> list[str]:
    return [f"not installed, so tests are skipped: {MISSING}; `make trainers lint` installs all"] * bool(MISSING)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20_240_404)


@pytest.fixture(params=EVERY_BACKEND)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to run an update. Tensors are made where it runs, if a test does not say otherwise."""
    with tensors_where_it_runs(request.param):
        yield request.param


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def backends(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """All of one device, for a test that sets them side by side."""
    with tensors_where_it_runs(request.param):
        yield BACKENDS if request.param == "cpu" else ("reference", *GPU_BACKENDS)


@pytest.fixture
def gpu() -> Iterator[Shim]:
    """Steers the device that stands in for a GPU under the backend "cuda on cpu"."""
    shim().reset()
    yield shim()
    shim().reset()


ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(not triton.INTERPRETS, reason="Triton runs on the GPU"))
ON_GPU = pytest.param(
    "gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(triton.INTERPRETS, reason="Triton runs on the CPU")]
)


@pytest.fixture(params=[ON_CPU, ON_GPU])
def where_triton_runs(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CPU, by Triton's interpreter, and a GPU where there is one. Tensors are made there."""
    with tensors_where_it_runs(request.param):
        yield torch.get_default_device().type


@pytest.fixture
def sync_debug_mode() -> Iterator[Callable[[str], None]]:
    """Sets what a wait for the GPU does, for one test."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    """Processes that train together. Tests that use them are of one `xdist_group`, "distributed"."""
    worlds = Worlds(tmp_path_factory.mktemp("worlds"))
    yield worlds
    worlds.close()


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For a test that sets the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[False, True], ids=["set_data", "swap_tensors"])
def swaps(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways of `Module.to` to give a module's parameters other memory."""
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(False)
