"""The shim that runs CUDA kernels on the CPU, on kernels whose mistakes are known."""

import ctypes
import shutil
import sys

import pytest
import torch
from cuda_shim.build import build
from cuda_shim.controls import ORDERS, Shim

THREADS = 256  # of a block, in toy.cu
NO_ERROR, INVALID_VALUE, INVALID_CONFIGURATION, INVALID_DEVICE, INVALID_HANDLE = 0, 1, 9, 101, 400
ILLEGAL_ADDRESS, TIMEOUT, MISALIGNED, FAILURE = 700, 702, 716, 719
NOT_PERMITTED, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 800, 900, 901
INVALIDATED = 2  # a stream's capture
RELAXED = 2
POISON = 0xCCCCCCCC - 2**32  # as int32

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not (shutil.which("c++") and shutil.which("nm")),
    reason="the shim needs Linux and a C++ compiler",
)


@pytest.fixture(scope="module")
def library():
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    return build("toy")


@pytest.fixture
def shim(library):
    shim = Shim(library)
    shim.reset()
    return shim


@pytest.fixture
def toy(shim):
    toy = shim.library
    toy.toy_stream.restype = ctypes.c_void_p
    toy.toy_add.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    toy.toy_synchronize.argtypes = toy.toy_capture_status.argtypes = (ctypes.c_void_p,)
    toy.toy_hold.argtypes = toy.toy_hold_and_call.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    toy.toy_last_error.restype = ctypes.c_char_p
    return toy


def pointer(tensor, offset=0):
    return ctypes.c_void_p(tensor.data_ptr() + offset)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def add_one(toy, address, count=1, stream=None):
    """To the first `count` int32 at an address."""
    return toy.toy_add(address, address, count, 1, stream)


# What kernels do, right and wrong.


@pytest.mark.parametrize("threads", ORDERS)
@pytest.mark.parametrize("blocks", ORDERS)
def test_blocks_and_threads_run_in_the_order_asked_for(shim, toy, blocks, threads):
    shim.set_order(blocks, threads, seed=3)
    when, clock = torch.zeros(5, 33, dtype=torch.int32), ints(0)
    assert toy.toy_order(5, 33, pointer(when), pointer(clock)) == NO_ERROR
    assert sorted(when.flatten().tolist()) == list(range(5 * 33))
    block_order = when.min(dim=1).values.argsort().tolist()
    thread_order = when[0].argsort().tolist()
    for order, asked in ((block_order, blocks), (thread_order, threads)):
        ascending = list(range(len(order)))
        expected = {"ascending": order == ascending, "descending": order == ascending[::-1]}
        assert expected.get(asked, order not in (ascending, ascending[::-1]))


def test_only_the_ends_of_a_grid_run(shim, toy):
    for blocks, asked in ((5, 2), (4, 2), (3, 2)):
        shim.run_only_the_ends(asked)
        when, clock = torch.full((blocks, 33), -1, dtype=torch.int32), ints(0)
        assert toy.toy_order(blocks, 33, pointer(when), pointer(clock)) == NO_ERROR
        ran = (when >= 0).all(dim=1).tolist()
        assert ran == [index < asked or index >= blocks - asked for index in range(blocks)]
        assert int(clock) == 33 * sum(ran)


def test_a_missing_barrier_shows(toy):
    given, out = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    assert toy.toy_reverse(True, pointer(given), pointer(out)) == NO_ERROR
    assert torch.equal(out, given.flip(0))
    assert toy.toy_reverse(False, pointer(given), pointer(out)) == NO_ERROR
    assert not torch.equal(out, given.flip(0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (0, TIMEOUT, "waits forever at __syncthreads"),  # the odd thread goes on to the next barrier
        (1, TIMEOUT, "255 threads of the block wait, 1 have returned"),
        (2, TIMEOUT, "waits forever at"),
        (3, FAILURE, "signed overflow at tests/cuda_shim/toy.cu:"),
    ],
    ids=["skips a barrier", "returns early", "skips a shuffle", "overflows"],
)
def test_a_wrong_kernel_is_stopped(shim, toy, what, error, words, order):
    shim.set_order(threads=order)
    assert toy.toy_wrong(what, pointer(ints(0))) == error
    assert words in shim.fault()
    # And the next kernel runs as if nothing had happened.
    test_a_missing_barrier_shows(toy)


@pytest.mark.parametrize("size", [16, 8])
def test_accesses_have_to_be_aligned(shim, toy, size):
    given, out = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    copy = getattr(toy, f"toy_copy_{size}")
    assert copy(pointer(given, size), pointer(out)) == NO_ERROR
    assert torch.equal(out[:size], given[size : 2 * size])
    assert copy(pointer(given, size // 2), pointer(out)) == MISALIGNED
    assert f"no multiple of {size} at tests/cuda_shim/toy.cu:" in shim.fault()
    assert copy(pointer(given), pointer(out, size // 2)) == MISALIGNED
    assert copy(pointer(given), None) == ILLEGAL_ADDRESS


def test_an_index_out_of_bounds_is_seen(shim, toy):
    out = ints(0)
    assert toy.toy_index(3, pointer(out)) == NO_ERROR
    assert toy.toy_index(4, pointer(out)) == ILLEGAL_ADDRESS
    assert "index out of bounds" in shim.fault()
    assert toy.toy_last_error() == b"cudaErrorIllegalAddress"
    assert toy.toy_last_error() == b"cudaSuccess"


def test_what_nobody_has_written_is_no_zero(toy):
    shared, local = ints(0, 0), ints(0, 0)
    assert toy.toy_uninitialised(pointer(shared), pointer(local)) == NO_ERROR
    assert shared.tolist() == [POISON] * 2
    assert 0 not in local


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_impossible_grids_are_refused(toy, blocks, threads):
    assert toy.toy_order(blocks, threads, None, None) == INVALID_CONFIGURATION


# Captures.


@pytest.mark.parametrize("what", ["allocate", "cudaStreamSynchronize"])
def test_what_may_wait_ends_a_capture(shim, toy, what):
    stream = shim.stream()
    held = shim.allocate(0, 4)

    def capture():
        with shim.capture(stream):
            if what == "allocate":
                assert shim.allocate(0, 4) is None
            else:
                assert toy.toy_synchronize(None) == CAPTURE_UNSUPPORTED
            assert toy.toy_capture_status(stream) == INVALIDATED
            assert add_one(toy, held, stream=stream) == CAPTURE_INVALIDATED

    with pytest.raises(RuntimeError, match=f"invalidated: {what} in a capture"):
        capture()
    assert shim.free(held) == NO_ERROR


def test_a_relaxed_thread_may_wait_but_not_for_the_captured_stream(shim, toy):
    stream = shim.stream()
    with shim.capture(stream):
        assert toy.toy_exchange_capture_mode(RELAXED) == 0
        assert not shim.capture_mode_is_global()
        assert shim.free(shim.allocate(0, 4)) == toy.toy_synchronize(None) == NO_ERROR
    with pytest.raises(RuntimeError, match="invalidated"), shim.capture(stream):
        assert toy.toy_synchronize(stream) == CAPTURE_UNSUPPORTED
    assert toy.toy_exchange_capture_mode(0) == RELAXED
    assert shim.capture_mode_is_global()


def test_a_graph_and_what_is_made_of_it_hold_what_they_need(shim, toy):
    stream, count = shim.stream(), ints(1)
    with shim.capture(stream) as graph:
        assert toy.toy_hold(stream, pointer(count)) == NO_ERROR
    executable = graph.instantiate()
    del graph
    assert count.tolist() == [1]
    executable.replay()
    del executable
    assert count.tolist() == [0]


def test_a_capture_that_fails_lets_go(shim, toy):
    stream, count = shim.stream(), ints(1)

    def capture():
        with shim.capture(stream):
            toy.toy_hold(stream, pointer(count))
            toy.toy_synchronize(None)
            assert count.tolist() == [1]

    with pytest.raises(RuntimeError, match="invalidated"):
        capture()
    assert count.tolist() == [0]


def test_what_lets_go_must_not_call_cuda(shim, toy):
    stream, error = shim.stream(), ints(0)
    with shim.capture(stream) as graph:
        toy.toy_hold_and_call(stream, pointer(error))
    del graph
    assert error.tolist() == [NOT_PERMITTED]
    assert shim.fault() == "cudaSetDevice in a callback"


# Memory and devices.


def test_memory_is_counted_and_starts_with_a_pattern(shim, toy):
    before = shim.allocations(0)
    first, second = shim.allocate(0, 12), shim.allocate(0, 5000)
    assert (shim.allocations(0) - before, shim.allocations(1)) == (2, 0)
    assert first % 256 == second % 256 == 0
    read = ints(0, 0, 0)
    assert add_one(toy, first, 2) == toy.toy_add(first, pointer(read), 3, 0, None) == NO_ERROR
    assert read.tolist() == [POISON + 1, POISON + 1, POISON]
    assert shim.free(first) == shim.free(second) == NO_ERROR
    assert shim.allocations(0) == before
    assert shim.free(first) == INVALID_VALUE


def test_memory_ends_where_it_ends(shim, toy):
    memory = shim.allocate(0, 4096)
    assert add_one(toy, memory, 1024) == NO_ERROR
    assert add_one(toy, memory, 1025) == ILLEGAL_ADDRESS
    assert f"nothing is at address {memory + 4096:#x} in thread 0 of block 0" in shim.fault()
    assert shim.free(memory) == NO_ERROR
    for address in (memory, 0x1000, 0xDDDDDDDDDDDDDDDC):
        assert add_one(toy, address) == ILLEGAL_ADDRESS


def test_devices_have_memory_and_streams_of_their_own(shim, toy):
    shim.set_devices(2)
    memory, stream = shim.allocate(0, 4), toy.toy_stream()
    assert add_one(toy, memory, stream=stream) == NO_ERROR
    assert toy.toy_set_device(1) == NO_ERROR
    there = toy.toy_stream()
    assert add_one(toy, memory, stream=stream) == INVALID_HANDLE
    assert add_one(toy, memory, stream=there) == ILLEGAL_ADDRESS
    assert [launch.device for launch in shim.launches()] == [0, 1, 1]
    assert toy.toy_set_device(2) == INVALID_DEVICE
    assert toy.toy_synchronize(0x10) == INVALID_HANDLE
    assert shim.free(memory) == NO_ERROR
