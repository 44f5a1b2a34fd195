"""Updates of low-memory state where 32 bits do not count the elements: the same bits as the oracle's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cuda_on_cpu import NAME
from cuda_shim.controls import Shim
from low_memory_cases import MODES, TRITON
from low_memory_ends import ENDS, check_ends, folded, numel_beyond, sparse
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from nexus.backends import sharding, triton
from nexus.backends.triton_tables import chunk_words

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="makes memory that is Linux's")
KERNELS = [
    NAME,
    pytest.param("triton", marks=pytest.mark.skipif(not TRITON, reason="Triton is not there, or runs on the GPU")),
]
FULL_STEPS: list[tuple[str, int, dict[str, Any]]] = [
    # Where the tail is in the whole tensor, if this is a shard. The draw of element 2**35 is the first that 32 bits
    # do not count.
    ("bf16 + 8, 8-bit moments by chance", 2**35, {"amsgrad": True}),
    ("bf16 + 16, bf16 moments", 2**35 - 3, {}),
    ("float32", 0, {}),
]
STEPS = [
    *FULL_STEPS,
    ("bf16 by chance", 2**35 - 3, {}),
    ("bf16, 8-bit moments by chance", 2**40, {}),
    ("float32, 8-bit moments", 2**35 - 3, {}),
]


def first_of_shard(place: int, edge: int, monkeypatch: pytest.MonkeyPatch) -> int:
    first = max(place - edge, 0)
    monkeypatch.setattr(sharding, "first_element", lambda tensor: first)
    return first


@pytest.fixture
def only_the_ends(gpu: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels of CUDA and Triton update only the first chunks of a tensor, and the last."""

    def ends_of_chunks(sizes: tuple[int, ...]) -> Tensor:
        rows = chunk_words(sizes)
        return torch.cat([rows[:ENDS], rows[-ENDS:]])

    gpu.run_only_the_ends(ENDS)  # a block has a chunk
    monkeypatch.setattr(triton, "chunk_words", ends_of_chunks)


@pytest.mark.parametrize(("name", "place", "options"), FULL_STEPS)
def test_native_steps(name: str, place: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # All of the elements are updated, but between the ends, most of them are the same.
    first = first_of_shard(place, 2**31, monkeypatch)
    check_ends("native", MODES[name], numel_beyond(2**31), folded, first=first, **options)


@pytest.mark.usefixtures("only_the_ends")
@pytest.mark.parametrize("way", KERNELS)
@pytest.mark.parametrize("edge", [2**31, 2**33])
@pytest.mark.parametrize(("name", "place", "options"), STEPS)
def test_kernels_of_gpus_step(
    name: str, place: int, options: dict[str, Any], edge: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = first_of_shard(place, edge, monkeypatch)
    check_ends(way, MODES[name], numel_beyond(edge), sparse, first=first, **options)


RANKS, RANK = 2**13, 2**12 + 1
SHAPE = (2**10, 2**13)  # of each part: the first element of this one is behind 2**35


@pytest.fixture
def spread_widely() -> Iterator[Callable[[Tensor], Tensor]]:
    """Makes a DTensor over thousands of processes of this one's part, which is flat. The others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    shape = torch.Size((RANKS * SHAPE[0], SHAPE[1]))

    def spread(part: Tensor) -> Tensor:
        return DTensor.from_local(
            part.view(SHAPE), mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1)
        )

    yield spread
    dist.destroy_process_group()


@pytest.mark.usefixtures("only_the_ends")
@pytest.mark.parametrize("way", ["native", *KERNELS])
def test_steps_of_a_distant_part(way: str, spread_widely: Callable[[Tensor], Tensor]) -> None:
    numel = SHAPE[0] * SHAPE[1]
    mode = MODES["bf16 + 8, 8-bit moments by chance"]
    check_ends(way, mode, numel, sparse, first=RANK * numel, spread=spread_widely)
