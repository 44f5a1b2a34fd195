"""The compiled kernels: the same bits whatever the instruction set and the threads, exact conversions, indices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from references import bits, copies, make_grads, make_params, same_bits, set_grads, snapshot
from torch import Tensor

from nexus import _native
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import Cosine

INSTRUCTION_SETS = _native.instruction_sets()
HALVES = [torch.bfloat16, torch.float16]
BLOCK, CHUNK = 512, 16_384


def native(params: Sequence[Any], instruction_set: str | None = None, **options: Any) -> FusedAdamW:
    optimizer = FusedAdamW(params, backend="native", **options)
    if instruction_set is not None:
        engine_of(optimizer).prepare(vars(optimizer)).records.use_instruction_set(instruction_set)
    return optimizer


def trained(
    params: Sequence[Tensor], rounds: Sequence[list[Tensor]], instruction_set: str | None = None, **options: Any
) -> list[Tensor]:
    """All that steps leave, and the norms that they measure."""
    own = copies(params)
    set_grads(own, rounds[0])
    optimizer = native(own, instruction_set, lr=1e-2, **options)
    norms = []
    for grads in rounds:
        set_grads(own, grads)
        optimizer.step()
        if optimizer.grad_norm is not None:
            norms.append(optimizer.grad_norm.clone())
    return snapshot(optimizer) + norms


def spoil(grads: list[Tensor]) -> None:
    """Some elements that are rarely met: subnormal, huge, infinite, NaN, negative zero."""
    for grad in grads:
        flat = grad.view(-1)
        for index, value in enumerate((1e-40, -1e-45, 6e4, -3e38, torch.inf, -torch.inf, torch.nan, -0.0)):
            if flat.numel() > 37 * (index + 1):
                flat[37 * (index + 1)] = value


@pytest.mark.parametrize("case", ["numbers", "specials", "all options"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_instruction_sets_give_the_same_bits(dtype: torch.dtype, case: str) -> None:
    shapes = [(), (1,), (7,), (8,), (9,), (15,), (17,), (BLOCK - 1,), (2 * BLOCK + 5,), (CHUNK + 3,)]
    params = make_params(shapes, dtype)
    rounds = [make_grads(params) for _ in range(5)]
    options: dict[str, Any] = {"weight_decay": 0.1}
    if case == "specials":
        for grads in rounds:
            spoil(grads)
    if case == "all options":
        options.update(amsgrad=True, maximize=True, max_grad_norm=1.0)
    found = [trained(params, rounds, name, **options) for name in INSTRUCTION_SETS]
    assert not same_bits(found[0][:1], [params[0]])
    for other in found[1:]:
        assert same_bits(found[0], other)


def test_an_unknown_instruction_set_is_refused() -> None:
    params = make_params([(3,)])
    set_grads(params, make_grads(params))
    with pytest.raises(ValueError, match="'sse' is not available"):
        native(params, "sse")


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    params = make_params([(CHUNK * 3 + 11,), (5,), (0,), (CHUNK,), (999, 33), ()], dtype)
    rounds = [make_grads(params) for _ in range(4)]
    found = []
    for threads in (1, 2, 3, 7, 64):
        torch.set_num_threads(threads)
        found.append(trained(params, rounds, max_grad_norm=1.0))
    for other in found[1:]:
        assert same_bits(found[0], other)


# Conversions of half precision. Every case runs in every instruction set, at every offset from a block's start.


def all_patterns(dtype: torch.dtype) -> Tensor:
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_numbers(actual: Tensor, expected: Tensor) -> None:
    """Equal bits, but any NaN is as good as another."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(bits(actual)[numbers], bits(expected)[numbers])


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("offset", [0, 3])
def test_every_half_is_read_as_torch_reads_it(dtype: torch.dtype, instruction_set: str, offset: int) -> None:
    values = all_patterns(dtype)[offset:]
    zeros, kept = torch.nn.Parameter(torch.zeros_like(values)), torch.nn.Parameter(values.clone())
    zeros.grad, kept.grad = values.clone(), torch.ones_like(values)
    optimizer = native([{"params": [zeros]}, {"params": [kept], "lr": 0.0}], instruction_set, betas=(0.0, 0.5))
    optimizer.step()  # the first moment is 0 + 1 * (g - 0)
    assert_same_numbers(optimizer.state[zeros]["exp_avg"] + 0.0, values.float() + 0.0)
    assert_same_numbers(kept.detach(), values)


def around_every_half(dtype: torch.dtype) -> Tensor:
    """In float32: every number of `dtype`, the middle to the next one, and both sides of either."""
    values = all_patterns(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()  # exact
    both = torch.cat([values, middles])
    infinity = torch.tensor(torch.inf)
    return torch.cat([both, torch.nextafter(both, infinity), torch.nextafter(both, -infinity)])


def written(values: Tensor, dtype: torch.dtype, instruction_set: str) -> Tensor:
    """`values`, float32, as the kernel stores them: the update of a parameter that is 0."""
    param = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype))
    param.grad_dtype = torch.float32
    found = torch.empty_like(param.detach())
    small = values.abs() < 2.0**30
    # Small values: the gradient is one over an eps beside which it vanishes, times a rate that undoes that.
    param.grad = torch.where(small, -values, 0.0)
    native([param], instruction_set, lr=2.0**60, eps=2.0**60, betas=(0.0, 0.0), weight_decay=0.0).step()
    found[small] = param.detach()[small]
    # Large ones: the first moment is halved by a gradient of 0, and twice the rate undoes that.
    param = torch.nn.Parameter(torch.zeros(values.shape, dtype=dtype))
    param.grad = torch.zeros(values.shape, dtype=dtype)
    optimizer = native([param], lr=1.0, eps=1.0, betas=(0.5, 0.5), weight_decay=0.0)
    engine_of(optimizer).prepare(vars(optimizer))
    optimizer.state[param]["exp_avg"].copy_(-values)
    engine_of(optimizer).prepare(vars(optimizer)).records.use_instruction_set(instruction_set)
    optimizer.step()
    found[~small] = param.detach()[~small]
    return found


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_rounding_to_half_is_torchs(dtype: torch.dtype, instruction_set: str) -> None:
    values = around_every_half(dtype)
    extra = torch.tensor(
        [1e-45, -1e-45, 2.0**-149 * 3, 65519.996, 65520.0, -65520.0, 1e38, 3.4028235e38, 3.3961776e38, torch.nan]
    )
    nan_of_ones = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)  # which a carry would make 0
    values = torch.cat([values, extra, -extra, nan_of_ones, torch.randn(1000) * 1e-5])
    for part in (values, values[3:]):  # other elements at the end of a block
        actual, expected = written(part, dtype, instruction_set), part.to(dtype)
        assert expected.isinf().any()
        assert expected.isnan().any()
        assert_same_numbers(actual + 0.0, expected + 0.0)  # -0 and 0 are equal here


# Indices.


@pytest.mark.parametrize("numel", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, 5 * CHUNK + 17])
@pytest.mark.parametrize("more", [0, 2**31 - 1, 2**31, 2**31 + 5, 2**32, 3 * 2**33 + 7, 2**40, 2**40 + 1])
def test_chunks_cover_every_element_once(numel: int, more: int) -> None:
    """All are full but the last, so that together they are the tensor."""
    numel += more
    chunks = _native.chunk_count(numel)
    assert chunks == -(-numel // CHUNK)
    edges = (0, 2**31, 2**32, 2**33, 2**39, numel // 2, numel)
    near = {edge // CHUNK + offset for edge in edges for offset in range(-6, 7)}
    for index in near.intersection(range(chunks)):
        begin = index * CHUNK
        assert _native.chunk(numel, index) == (begin, min(CHUNK, numel - begin))


# Threads and processes.

FORK = """
import os, signal, torch
from nexus.optim import FusedAdamW
torch.set_num_threads({before})
params = [torch.nn.Parameter(torch.ones(20_011)) for _ in range(6)]
for param in params:
    param.grad = torch.ones(20_011)
optimizer = FusedAdamW(params, lr=0.5, weight_decay=0.0, max_grad_norm=1e9)
optimizer.step()
torch.set_num_threads(2)
(torch.ones(500_000) * 2).sum()  # starts torch's pool of threads
child = os.fork()
if child == 0:
    signal.alarm(30)
    for _ in range(3):
        optimizer.step()
    right = all(torch.allclose(param, torch.full_like(param, -1.0)) for param in params)
    os._exit(0 if right else 3)
optimizer.step()
assert torch.allclose(params[0], torch.zeros(20_011), atol=1e-6), params[0]
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("before", [1, 2], ids=["pool started by torch alone", "pool used before"])
def test_a_forked_child_steps(before: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK.format(before=before)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "0", result.stdout + result.stderr


class StepsInWorker(torch.utils.data.Dataset):
    """Trains in the process that loads the data."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        assert torch.get_num_threads() == 1  # torch's own choice for a worker
        param = torch.nn.Parameter(torch.ones(3 * CHUNK))
        param.grad = torch.ones(3 * CHUNK)
        optimizer = FusedAdamW([param], lr=Cosine(peak_lr=0.5, total_steps=100), weight_decay=0.0)
        for step in range(index):
            optimizer.step()
            if step == 0:
                torch.set_num_threads(2)
        torch.set_num_threads(1)
        return param.detach()[:2].clone()


def test_a_worker_of_a_data_loader_steps() -> None:
    expected = [1.0]
    for step in range(3):
        expected.append(expected[-1] - Cosine(peak_lr=0.5, total_steps=100)(step))
    batches = list(torch.utils.data.DataLoader(StepsInWorker(), num_workers=1, batch_size=None, timeout=60))
    torch.testing.assert_close(torch.stack(batches)[:, 0], torch.tensor(expected))
