"""Steps of tensors with more elements than 32 bits count, of which both ends are compared with the oracle.

They take little memory: nothing of what lies between the ends counts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Any

import low_memory_oracle as oracle
import torch
from low_memory_cases import optimizer_of
from low_memory_oracle import SCALE_BLOCK, Mode
from torch import Tensor

CHUNK = 16_384
ENDS = 4  # chunks at each end
SEED = 0x1234_5678_9ABC_DEF0
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.5, 0.75)}  # powers of these betas are exact everywhere
Allocate = Callable[[int, torch.dtype], Tensor]
"""Zeros, or what lies between the ends: so many elements in a row."""

_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_NO_RESERVE, _FIXED, _POPULATE = 0x4000, 0x10, 0x8000  # of Linux
_PIECE = 4 << 20


def numel_beyond(edge: int) -> int:
    """Elements of a tensor whose last chunks are around `edge`, and whose last one is not full."""
    return edge + (ENDS - 2) * CHUNK + 130


def _tail(numel: int) -> int:
    """The first element of the last chunks."""
    return (-(-numel // CHUNK) - ENDS) * CHUNK


def sparse(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take memory only where somebody writes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize, flags=flags), dtype=dtype)


def folded(numel: int, dtype: torch.dtype) -> Tensor:
    """Zeros that may be written everywhere: between the ends, a few megabytes of memory come over and over."""
    tensor = sparse(numel, dtype)
    begin, end = ENDS * CHUNK * dtype.itemsize, _tail(numel) * dtype.itemsize
    begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long)
    piece = os.memfd_create("folded")
    os.ftruncate(piece, _PIECE)
    for start in range(begin, end, _PIECE):
        address, size = tensor.data_ptr() + start, min(_PIECE, end - start)
        flags = mmap.MAP_SHARED | _FIXED | _POPULATE
        assert library.mmap(address, size, _READ_WRITE, flags, piece, 0) == address, os.strerror(ctypes.get_errno())
    os.close(piece)
    return tensor


def _block(name: str) -> int:
    """Elements of the tensor for each one of a stream."""
    return SCALE_BLOCK if name.endswith("_scale") else 1


def check_ends(
    way: str,
    mode: Mode,
    numel: int,
    allocate: Allocate,
    *,
    first: int = 0,
    amsgrad: bool = False,
    spread: Callable[[Tensor], Tensor] = lambda stream: stream,
) -> None:
    """Make one step, and compare the ends.

    Args:
        way: how, as of `optimizer_of`.
        mode: how the state is stored.
        numel: elements of the tensor, see `numel_beyond`.
        allocate: gives its streams.
        first: where its element 0 is in the whole tensor, as the step is told too.
        amsgrad: with it, or without.
        spread: makes what the optimizer sees of a stream.
    """
    settings = oracle.Settings(amsgrad=amsgrad, **OPTIONS)
    ends = {0: ENDS * CHUNK, _tail(numel): numel - _tail(numel)}
    oracles = {}
    for begin, count in ends.items():
        values = torch.randn(count, device="cpu").to(mode.param)
        ours = oracles[begin] = oracle.Parameter(values, mode, seed=SEED, first=first + begin, whole=numel)
        ours.step(torch.randn(count, device="cpu").to(mode.param), settings)  # so that there is a state
    tensors = {"grad": allocate(numel, mode.param)}
    for name, stored in ours.streams(amsgrad).items():
        # The oracle's bfloat16 is uint16; its scales are a row of their own.
        dtype = torch.bfloat16 if stored.dtype == "uint16" else getattr(torch, str(stored.dtype))
        tensors[name] = allocate(-(-numel // _block(name)), dtype)

    def part(name: str, begin: int, count: int) -> Tensor:
        return tensors[name][begin // _block(name) : -(-(begin + count) // _block(name))]

    for begin, count in ends.items():
        for name, stored in oracles[begin].streams(amsgrad).items():
            part(name, begin, count).copy_(torch.from_numpy(stored).view(tensors[name].dtype))
        grad = torch.randn(count, device="cpu").to(mode.param)
        oracles[begin].step(grad, settings)
        part("grad", begin, count).copy_(grad)
    param = torch.nn.Parameter(spread(tensors["param"]))
    param.grad = spread(tensors["grad"])
    optimizer = optimizer_of(way, [param], mode, amsgrad=amsgrad, seed=SEED, **OPTIONS)
    seen = {name: tensor if name.endswith("_scale") else spread(tensor) for name, tensor in tensors.items()}
    state = {name: tensor for name, tensor in seen.items() if name not in ("param", "grad")}
    step = torch.ones((), dtype=torch.float64, device=param.device)
    optimizer.state[param] = {"step": step, **state}
    optimizer.step()
    assert all(optimizer.state[param][name] is tensor for name, tensor in state.items())
    for begin, count in ends.items():
        for name, stored in oracles[begin].streams(amsgrad).items():
            found = oracle.stored_bits(part(name, begin, count).cpu())
            wrong = oracle.unequal(found, stored)
            assert not wrong.any(), f"{name} from {begin} on differs at {wrong.nonzero()[0].tolist()[:5]}"
