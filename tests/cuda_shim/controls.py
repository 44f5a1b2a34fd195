"""Steers the shim in a library that build.py has built, and reads what happened there."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ORDERS = ("ascending", "descending", "shuffled")


class Launch(NamedTuple):
    kernel: str  # its name, without namespaces and template arguments
    grid: int  # blocks
    stream: int
    device: int
    captured: bool


class Graph:
    """What was enqueued on a stream while it was captured. Dropped, it lets go of what it holds."""

    def __init__(self, shim: Shim, number: int):
        self.shim = shim
        self.number = number

    def replay(self) -> None:
        error = self.shim.library.nexus_shim_replay(self.number)
        if error:
            raise RuntimeError(f"replay stopped with error {error}: {self.shim.fault()}")

    def instantiate(self) -> Graph:
        """An executable graph: it holds by itself what this one holds."""
        return Graph(self.shim, self.shim.library.nexus_shim_instantiate(self.number))

    def __del__(self) -> None:
        self.shim.library.nexus_shim_destroy(self.number)


class Shim:
    """The controls of one library. A test calls reset() first: settings outlive it."""

    def __init__(self, library: Path | str):
        self.library = ctypes.CDLL(str(library))
        self.library.nexus_shim_fault.restype = ctypes.c_char_p
        self.library.nexus_shim_stream.restype = ctypes.c_void_p
        self.library.nexus_shim_fail.argtypes = (ctypes.c_char_p, ctypes.c_int, ctypes.c_int)
        self.library.nexus_shim_set_order.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_uint64)
        self.library.nexus_shim_begin_capture.argtypes = (ctypes.c_void_p,)
        self.library.nexus_shim_capture_mode_is_global.restype = ctypes.c_bool
        self.library.nexus_shim_allocate.restype = ctypes.c_void_p
        self.library.nexus_shim_allocate.argtypes = (ctypes.c_int, ctypes.c_size_t)
        self.library.nexus_shim_free.argtypes = (ctypes.c_void_p,)
        # dladdr() does not know names with internal linkage, which kernels have.
        symbols = subprocess.run(["nm", "-C", str(library)], check=True, capture_output=True, text=True).stdout
        found = re.findall(
            r"^([0-9a-f]+) [tTW] .*?(\w+)[<(]", symbols.replace("(anonymous namespace)", ""), re.MULTILINE
        )
        self._names = {int(address, 16): name for address, name in found}

    def reset(self) -> None:
        """One device, whole grids in ascending orders; no failures, launches, calls, graphs or error.

        Streams stay, and so does memory that is not freed; device 0 is current again.
        """
        self.library.nexus_shim_reset()

    def set_devices(self, count: int) -> None:
        self.library.nexus_shim_set_devices(count)

    def set_order(self, blocks: str = "ascending", threads: str = "ascending", seed: int = 0) -> None:
        """The order in which blocks, and the threads of a block, run between barriers: one of ORDERS."""
        self.library.nexus_shim_set_order(ORDERS.index(blocks), ORDERS.index(threads), seed)

    def run_only_the_ends(self, blocks: int) -> None:
        """Of each grid, run only so many of the first blocks, and of the last."""
        self.library.nexus_shim_set_ends(blocks)

    def fail(self, error: int, nth: int = 1, function: str = "cudaLaunchKernelEx") -> None:
        """Let the ``nth`` call of a function, CUDA's or "allocate", from now on do nothing but return ``error``."""
        self.library.nexus_shim_fail(function.encode(), nth - 1, error)

    def stream(self, device: int = 0) -> int:
        """The handle of a new stream."""
        return self.library.nexus_shim_stream(device)

    @contextmanager
    def capture(self, stream: int) -> Iterator[Graph]:
        """Keep what is enqueued on ``stream`` in a graph, instead of running it.

        Calls that may wait for the device end the capture with an error, unless the thread is relaxed about them.
        """
        graph = Graph(self, self.library.nexus_shim_begin_capture(stream))
        try:
            yield graph
        finally:
            error = self.library.nexus_shim_end_capture()
        if error:
            raise RuntimeError(f"the capture was invalidated: {self.fault()}")

    def launches(self) -> list[Launch]:
        """What was launched since reset(); replays do not count."""
        found = []
        for index in range(self.library.nexus_shim_launch_count()):
            fields = (ctypes.c_int64 * 5)()
            self.library.nexus_shim_launch(index, fields)
            kernel, grid, stream, device, captured = fields
            found.append(Launch(self._names[kernel], grid, stream, device, bool(captured)))
        return found

    def calls(self, function: str) -> int:
        """How often one of CUDA's functions was called since reset()."""
        return self.library.nexus_shim_calls(function.encode())

    def allocate(self, device: int, nbytes: int) -> int | None:
        """The address of memory of a device; None where there is none. Counts as a call of "allocate"."""
        return self.library.nexus_shim_allocate(device, nbytes)

    def free(self, address: int) -> int:
        """Take memory back; an error, or 0. Counts as a call of "free"."""
        return self.library.nexus_shim_free(address)

    def allocations(self, device: int = 0) -> int:
        """How many allocations of a device's memory are not freed."""
        return self.library.nexus_shim_allocations(device)

    def capture_mode_is_global(self) -> bool:
        """Whether this thread's capture mode is what it is at first."""
        return self.library.nexus_shim_capture_mode_is_global()

    def fault(self) -> str:
        """What the kernel that was stopped last did wrong, and where; or the call that ended a capture."""
        return self.library.nexus_shim_fault().decode()
