"""The shim that runs CUDA kernels on the CPU, on kernels whose results and mistakes are known."""

import ctypes
import shutil
import sys
import time

import pytest
import torch
from cuda_shim.build import build
from cuda_shim.controls import ORDERS, Shim

THREADS = 256  # of a block, in toy.cu
NO_ERROR, INVALID_VALUE, INVALID_CONFIGURATION, INVALID_HANDLE = 0, 1, 9, 400
ILLEGAL_ADDRESS, TIMEOUT, MISALIGNED, FAILURE, CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED = 700, 702, 716, 719, 900, 901
RELAXED = 2

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
    toy.toy_malloc.restype = toy.toy_stream.restype = ctypes.c_void_p
    toy.toy_malloc.argtypes = (ctypes.c_size_t,)
    toy.toy_add.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    toy.toy_copy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    toy.toy_set.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p)
    for function in (toy.toy_free, toy.toy_synchronize, toy.toy_destroy):
        function.argtypes = (ctypes.c_void_p,)
    return toy


def pointer(tensor, offset=0):
    return ctypes.c_void_p(tensor.data_ptr() + offset)


def contents(toy, address, count):
    """``count`` int32 of a device."""
    out = torch.zeros(count, dtype=torch.int32)
    assert toy.toy_copy(pointer(out), address, 4 * count, None) == NO_ERROR
    return out.tolist()


@pytest.mark.parametrize("threads", ORDERS)
@pytest.mark.parametrize("blocks", ORDERS)
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 10_007])
def test_a_two_stage_sum_is_right_whatever_the_order(shim, toy, count, blocks, threads):
    shim.set_order(blocks, threads, seed=count)
    values = torch.randint(-1000, 1000, (count,)).float()
    sums, finished, out = torch.zeros(7, dtype=torch.float64), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    out = out.double()
    for _ in range(2):
        error = toy.toy_sum(
            pointer(values), ctypes.c_int64(count), 7, pointer(sums), pointer(finished), pointer(out), None
        )
        assert error == NO_ERROR, shim.fault()
        assert out.item() == values.double().sum().item()
        assert finished.item() == 0


@pytest.mark.parametrize("threads", ORDERS)
@pytest.mark.parametrize("blocks", ORDERS)
def test_blocks_and_threads_run_in_the_order_asked_for(shim, toy, blocks, threads):
    shim.set_order(blocks, threads, seed=3)
    when, clock = torch.zeros(5, 33, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert toy.toy_order(5, 33, pointer(when), pointer(clock)) == NO_ERROR
    assert sorted(when.flatten().tolist()) == list(range(5 * 33))
    block_order = when.min(dim=1).values.argsort().tolist()
    thread_order = when[0].argsort().tolist()
    for order, asked in ((block_order, blocks), (thread_order, threads)):
        ascending = list(range(len(order)))
        expected = {"ascending": order == ascending, "descending": order == ascending[::-1]}
        assert expected.get(asked, order not in (ascending, ascending[::-1]))


def test_a_missing_barrier_shows(toy):
    given, out = torch.arange(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    assert toy.toy_reverse(True, pointer(given), pointer(out)) == NO_ERROR
    assert torch.equal(out, given.flip(0))
    assert toy.toy_reverse(False, pointer(given), pointer(out)) == NO_ERROR
    assert not torch.equal(out, given.flip(0))


@pytest.mark.parametrize("predicates", [[0] * 40, [1] * 40, [0] * 39 + [2]])
def test_votes_reach_every_thread(toy, predicates):
    given = torch.tensor(predicates, dtype=torch.int32)
    some, every = torch.full((40,), -1, dtype=torch.int32), torch.full((40,), -1, dtype=torch.int32)
    assert toy.toy_votes(40, pointer(given), pointer(some), pointer(every)) == NO_ERROR
    assert set(some.bool().tolist()) == {any(predicates)}
    assert set(every.bool().tolist()) == {all(predicates)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        (0, TIMEOUT, "waits forever at __syncthreads"),  # the odd thread goes on to the next barrier
        (1, TIMEOUT, "255 threads of the block wait, 1 have returned"),
        (2, TIMEOUT, "__syncthreads_or()"),
        (3, TIMEOUT, "waits forever at"),
        (4, FAILURE, "lacks its own lane"),
        (5, FAILURE, "signed overflow at tests/cuda_shim/toy.cu:"),
    ],
    ids=["skips a barrier", "returns early", "mixes barriers", "skips a shuffle", "foreign mask", "overflows"],
)
def test_a_wrong_kernel_is_stopped(shim, toy, what, error, words, order):
    shim.set_order(threads=order)
    sink = torch.zeros(1, dtype=torch.int32)
    assert toy.toy_wrong(what, pointer(sink)) == error
    assert words in shim.fault()
    # And the next kernel runs as if nothing had happened.
    test_votes_reach_every_thread(toy, [0] * 39 + [2])


@pytest.mark.parametrize(("function", "bytes_each"), [("toy_copy_float4", 16), ("toy_copy_double", 8)])
def test_accesses_have_to_be_aligned(shim, toy, function, bytes_each):
    given, out = torch.arange(64, dtype=torch.uint8), torch.zeros(64, dtype=torch.uint8)
    copy = getattr(toy, function)
    assert copy(pointer(given, bytes_each), pointer(out)) == NO_ERROR
    assert torch.equal(out[:bytes_each], given[bytes_each : 2 * bytes_each])
    assert copy(pointer(given, bytes_each // 2), pointer(out)) == MISALIGNED
    assert f"no multiple of {bytes_each} at tests/cuda_shim/toy.cu:" in shim.fault()
    assert copy(pointer(given), pointer(out, bytes_each // 2)) == MISALIGNED
    assert copy(pointer(given), None) == ILLEGAL_ADDRESS


def test_an_index_out_of_bounds_is_seen(shim, toy):
    out = torch.zeros(1, dtype=torch.int32)
    assert toy.toy_index(3, pointer(out)) == NO_ERROR
    assert toy.toy_index(4, pointer(out)) == ILLEGAL_ADDRESS
    assert "index out of bounds" in shim.fault()
    toy.toy_last_error.restype = ctypes.c_char_p
    assert toy.toy_last_error() == b"cudaErrorIllegalAddress"
    assert toy.toy_last_error() == b"cudaSuccess"


def test_what_nobody_has_written_is_no_zero(toy):
    shared, local, idle = (torch.zeros(2, dtype=torch.int32) for _ in range(3))
    assert toy.toy_uninitialised(pointer(shared), pointer(local), pointer(idle)) == NO_ERROR
    assert [word & 0xFFFFFFFF for word in shared.tolist()] == [0xCCCCCCCC] * 2
    assert all(word != 0 for word in local.tolist())
    assert [word & 0xFFFFFFFF for word in idle.tolist()] == [0xCCCCCCCC] * 2


def test_a_launch_fails_when_asked_to(shim, toy):
    shim.fail(FAILURE, nth=2)
    results = [toy.toy_barriers(1) for _ in range(3)]
    assert results == [NO_ERROR, FAILURE, NO_ERROR]


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_impossible_grids_are_refused(toy, blocks, threads):
    assert toy.toy_order(blocks, threads, None, None) == INVALID_CONFIGURATION


def test_launches_are_recorded(shim, toy):
    given, out = torch.zeros(THREADS, dtype=torch.int32), torch.zeros(THREADS, dtype=torch.int32)
    toy.toy_barriers(1)
    toy.toy_reverse(True, pointer(given), pointer(out))
    first, second = shim.launches()
    assert (first.kernel, first.grid, first.block) == ("barriers_kernel", (1, 1, 1), (THREADS, 1, 1))
    assert second.kernel == "reverse_kernel"
    assert "<true>" in second.signature
    shim.reset()
    assert shim.launches() == []


def test_a_captured_launch_runs_at_each_replay(shim, toy):
    stream = shim.stream()
    values, sums, finished = torch.ones(300), torch.zeros(7).double(), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(1, dtype=torch.float64)

    def launch(stream):
        count = ctypes.c_int64(300)
        parameters = (pointer(values), count, 7, pointer(sums), pointer(finished), pointer(out))
        assert toy.toy_sum(*parameters, ctypes.c_void_p(stream)) == NO_ERROR

    with shim.capture(stream) as graph:
        assert toy.toy_is_capturing(ctypes.c_void_p(stream)) == 1
        assert toy.toy_is_capturing(None) == 0
        launch(stream)
    assert toy.toy_is_capturing(ctypes.c_void_p(stream)) == 0
    assert out.item() == 0
    assert [(launch.stream, launch.captured) for launch in shim.launches()] == [(stream, True)]
    for value in (2.0, 3.0):
        values.fill_(value)
        graph.replay()
        assert out.item() == 300 * value
    assert len(shim.launches()) == 1


def test_a_capture_keeps_copies_and_runs_other_streams(shim, toy):
    stream, other = shim.stream(), shim.stream()
    values, given = torch.zeros(2, dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    with shim.capture(stream) as first:
        assert toy.toy_copy(pointer(values), pointer(given), 8, stream) == NO_ERROR
        assert toy.toy_add(values.data_ptr(), 2, 10, stream) == NO_ERROR
        assert toy.toy_add(values.data_ptr(), 2, 5, other) == NO_ERROR
    with shim.capture(stream) as second:
        assert toy.toy_set(pointer(values), 0, 4, stream) == NO_ERROR
    assert values.tolist() == [5, 5]
    given += 2  # read at replay, as pageable memory is
    first.replay()
    assert values.tolist() == [13, 14]
    second.replay()
    assert values.tolist() == [0, 14]


@pytest.mark.parametrize("what", ["cudaMalloc", "cudaFree", "cudaStreamSynchronize"])
def test_what_may_wait_ends_a_capture(shim, toy, what):
    stream = shim.stream()
    held = toy.toy_malloc(4)
    call = {
        "cudaMalloc": lambda: toy.toy_malloc(4) is None and CAPTURE_UNSUPPORTED,
        "cudaFree": lambda: toy.toy_free(held),
        "cudaStreamSynchronize": lambda: toy.toy_synchronize(None),
    }[what]

    def capture():
        with shim.capture(stream):
            assert call() == CAPTURE_UNSUPPORTED
            assert toy.toy_is_capturing(ctypes.c_void_p(stream)) == 2
            assert toy.toy_add(held, 1, 1, stream) == CAPTURE_INVALIDATED

    with pytest.raises(RuntimeError, match=f"invalidated: {what} in a capture"):
        capture()
    assert toy.toy_free(held) == NO_ERROR

    # The thread, or the capture, may be relaxed about it; but the captured stream itself cannot be waited for.
    with shim.capture(stream):
        assert toy.toy_exchange_capture_mode(RELAXED) == 0
        assert not shim.capture_mode_is_global()
        assert toy.toy_free(toy.toy_malloc(4)) == NO_ERROR
        assert toy.toy_exchange_capture_mode(0) == RELAXED
    with shim.capture(stream, relaxed=True):
        assert toy.toy_synchronize(None) == NO_ERROR
    with pytest.raises(RuntimeError, match="invalidated"), shim.capture(stream, relaxed=True):
        assert toy.toy_synchronize(stream) == CAPTURE_UNSUPPORTED


def test_memory_is_counted_and_starts_with_a_pattern(shim, toy):
    shim.set_devices(2)
    before = shim.allocations(0)
    first, second = toy.toy_malloc(12), toy.toy_malloc(5000)
    assert (shim.allocations(0) - before, shim.allocations(1)) == (2, 0)
    assert first % 256 == second % 256 == 0
    assert contents(toy, first, 3) == [0xCCCCCCCC - 2**32] * 3
    assert toy.toy_set(first, 0, 12, None) == NO_ERROR
    assert toy.toy_add(first, 3, 7, None) == NO_ERROR
    assert contents(toy, first, 3) == [7, 7, 7]
    assert [toy.toy_free(address) for address in (first, second, None)] == [NO_ERROR] * 3
    assert shim.allocations(0) == before
    assert toy.toy_free(first) == INVALID_VALUE
    shim.fail(2, function="cudaMalloc")
    assert toy.toy_malloc(1) is None
    assert shim.calls("cudaMalloc") == 3


def test_memory_ends_where_it_ends(shim, toy):
    memory = toy.toy_malloc(4096)
    assert toy.toy_add(memory, 1024, 1, None) == NO_ERROR
    assert toy.toy_add(memory, 1025, 1, None) == ILLEGAL_ADDRESS
    assert f"nothing is at address {memory + 4096:#x} in thread (0, 0, 0)" in shim.fault()
    assert toy.toy_free(memory) == NO_ERROR
    assert toy.toy_add(memory, 1, 1, None) == ILLEGAL_ADDRESS
    assert toy.toy_add(0x1000, 1, 1, None) == ILLEGAL_ADDRESS
    assert toy.toy_add(0xDDDDDDDDDDDDDDDC, 1, 1, None) == ILLEGAL_ADDRESS


def test_devices_have_memory_and_streams_of_their_own(shim, toy):
    shim.set_devices(2)
    memory, stream = toy.toy_malloc(4), toy.toy_stream()
    assert toy.toy_add(memory, 1, 1, stream) == NO_ERROR
    assert toy.toy_set_device(1) == NO_ERROR
    there = toy.toy_stream()
    assert shim.streams(1) == 1
    assert toy.toy_add(memory, 1, 1, stream) == INVALID_HANDLE
    assert toy.toy_add(memory, 1, 1, there) == ILLEGAL_ADDRESS
    assert [launch.device for launch in shim.launches()] == [0, 1, 1]
    assert toy.toy_set_device(2) != NO_ERROR
    assert [toy.toy_destroy(each) for each in (there, stream)] == [NO_ERROR] * 2
    assert toy.toy_destroy(stream) == toy.toy_synchronize(stream) == INVALID_HANDLE
    assert shim.streams(1) == 0
    toy.toy_free(memory)


def test_the_device_is_as_set(shim, toy):
    shim.set_devices(multiprocessors=132)
    assert toy.toy_multiprocessors() == 132


def test_fibers_are_fast_enough_for_tests(toy):
    def milliseconds(function, *arguments):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            assert function(*arguments) == NO_ERROR
            times.append(1e3 * (time.perf_counter() - start))
        return min(times)

    assert milliseconds(toy.toy_barriers, 10) < 5
    when, clock = torch.zeros(100 * THREADS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    assert milliseconds(toy.toy_order, 100, THREADS, pointer(when), pointer(clock)) < 20
