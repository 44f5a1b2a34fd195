"""Updates of low-memory state: the same bits as the oracle's, whatever runs them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import low_memory_oracle as oracle
import numpy as np
import pytest
import torch
from cuda_on_cpu import NAME, captured_step
from low_memory_cases import MODES, TRITON, VALUES, WAYS, around_thresholds, optimizer_of, values
from low_memory_oracle import Array, Mode
from references import LAYOUTS, params_of, same_bits, set_grads, snapshot, through_a_file
from torch import Tensor

from nexus.backends import codecs, sharding, triton
from nexus.optim import FusedAdamW

SHAPES = [(16_384 + 130,), (7,), (0,), (), (67, 65), (32, 128)]
ROUNDS = ("numbers", "sparse", "numbers", "specials", "numbers")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "betas": (0.5, 0.8), "eps": 1e-3},
    "clip": {"max_grad_norm": 0.7, "weight_decay": 0.0},
    "everything": {"amsgrad": True, "maximize": True, "max_grad_norm": 3.0, "weight_decay": 0.1},
}
SEED = 0x1234_5678_9ABC_DEF0
ways = pytest.mark.parametrize("way", WAYS)
modes = pytest.mark.parametrize("name", MODES)


@functools.cache
def started(name: str) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters, and rounds of gradients, whose elements are of very different size."""
    torch.manual_seed(0)
    dtype = MODES[name].param
    params = [(torch.randn(shape) * 2).to(dtype) for shape in SHAPES]
    scales = [torch.randn(shape).exp() ** 2 for shape in SHAPES]
    rounds = []
    for case in ROUNDS:
        grads = [torch.from_numpy(values(case, x.numel())).view(x.shape) * x for x in scales]
        rounds.append([grad.clamp(-1e4, 1e4).to(dtype) for grad in grads])
    return params, rounds


@functools.cache
def expected(name: str, option: str) -> list[dict[str, Array]]:
    """All streams of each parameter, by the oracle."""
    params, rounds = started(name)
    options = dict(OPTIONS[option])
    limit = options.pop("max_grad_norm", np.inf)
    ours = [oracle.Parameter(param, MODES[name], ordinal, SEED) for ordinal, param in enumerate(params)]
    for grads in rounds:
        norm = float(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt())
        settings = oracle.Settings(lr=1e-2, grad_multiplier=min(1.0, limit / (norm + 1e-6)), **options)
        for parameter, grad in zip(ours, grads, strict=True):
            parameter.step(grad, settings)
    return [parameter.streams(amsgrad="amsgrad" in options) for parameter in ours]


def run(optimizer: FusedAdamW, rounds: Sequence[Sequence[Tensor | None]]) -> FusedAdamW:
    for grads in rounds:
        set_grads(params_of(optimizer), grads)
        optimizer.step()
    return optimizer


def parameters(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.clone()) for param in params]


def assert_equals_the_oracle(optimizer: FusedAdamW, oracles: Sequence[dict[str, Array]]) -> None:
    for index, (param, streams) in enumerate(zip(params_of(optimizer), oracles, strict=True)):
        state = {"param": param, **optimizer.state[param]}
        del state["step"]
        assert set(state) == set(streams)
        for name, stored in streams.items():
            wrong = oracle.unequal(oracle.stored_bits(state[name]), stored)
            assert not wrong.any(), f"parameter {index}: {name} differs at {wrong.nonzero()[0].tolist()[:5]}"


@ways
@pytest.mark.parametrize("option", OPTIONS)
@modes
def test_updates_equal_the_oracle(name: str, option: str, way: str) -> None:
    params, rounds = started(name)
    optimizer = optimizer_of(way, parameters(params), MODES[name], lr=1e-2, seed=SEED, **OPTIONS[option])
    assert_equals_the_oracle(run(optimizer, rounds), expected(name, option))


@pytest.mark.skipif(not TRITON, reason="Triton is not there, or runs on the GPU")
@pytest.mark.parametrize("name", ["bf16 + 8, 8-bit moments by chance", "float32, bf16 and uint8"])
def test_programs_of_many_blocks_equal_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: else, interpreted, a chunk is one block.
    monkeypatch.setattr(triton, "block_elements", lambda param, grad: 4096)
    params, rounds = started(name)
    optimizer = optimizer_of("triton", parameters(params), MODES[name], lr=1e-2, seed=SEED, **OPTIONS["everything"])
    assert_equals_the_oracle(run(optimizer, rounds), expected(name, "everything"))


@ways
@pytest.mark.parametrize("case", [*VALUES, "first thresholds", "second thresholds"])
@pytest.mark.parametrize("by_chance", [False, True], ids=["to nearest", "by chance"])
@pytest.mark.parametrize("name", ["float32, 8-bit moments", "float32, bf16 moments", "bf16 + 8, 8-bit moments"])
def test_values_that_are_hard_to_store(name: str, by_chance: bool, case: str, way: str) -> None:
    # Of a first update without momentum, the moments are the gradient and its square.
    mode = Mode(**{**vars(MODES[name]), "stochastic_rounding": by_chance})
    numel = 10_007 if case in VALUES else 128 * 200
    if case in VALUES:
        grad = values(case)
    elif case == "first thresholds":
        grad = around_thresholds(2, 127, np.full(numel, 0.5))
    else:
        u = oracle.Chance(SEED, 0, 1, 0, numel).of_moments() / 2**16 if by_chance else np.full(numel, 0.5)
        grad = np.sqrt(around_thresholds(4, 255, u))
    param = torch.from_numpy(values("wide", numel)).nan_to_num().to(mode.param)
    ours = oracle.Parameter(param, mode, seed=SEED)
    ours.step(torch.from_numpy(grad), oracle.Settings(betas=(0.0, 0.0)))
    optimizer = optimizer_of(way, parameters([param]), mode, betas=(0.0, 0.0), seed=SEED)
    params_of(optimizer)[0].grad_dtype = torch.float32
    assert_equals_the_oracle(run(optimizer, [[torch.from_numpy(grad)]]), [ours.streams()])


@ways
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "as_strided"])  # which is of one shape
@pytest.mark.parametrize("name", ["float32, 8-bit moments by chance", "bf16 + 8, 8-bit moments by chance"])
def test_elements_are_taken_in_the_order_of_the_memory(name: str, layout: str, way: str) -> None:
    mode = MODES[name]
    shape = (24, 13, 4, 5)
    param = torch.nn.Parameter(
        LAYOUTS["contiguous" if layout == "as_strided" else layout](torch.randn(shape).to(mode.param))
    )
    optimizer = optimizer_of(way, [param], mode, seed=SEED)
    ours = oracle.Parameter(torch.empty_like(param).copy_(param.detach()), mode, seed=SEED)
    for _ in range(3):
        grad = torch.randn(shape).to(mode.param)
        ours.step(torch.empty_like(param).copy_(grad), oracle.Settings())
        run(optimizer, [[grad]])
    found = optimizer.state[param] | {"param": torch.empty_like(param).copy_(param.detach())}
    for stream, stored in ours.streams().items():
        assert not oracle.unequal(oracle.stored_bits(found[stream]), stored).any(), stream


@ways
@pytest.mark.parametrize("first", [3, 2**35 - 8, 2**40 + 5])
@pytest.mark.parametrize("name", ["bf16 + 8, bf16 moments by chance", "float32, 8-bit moments by chance"])
def test_a_shard_is_rounded_as_its_place_in_the_whole(
    name: str, first: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "first_element", lambda tensor: first)
    param = torch.randn(16_384 + 130).to(MODES[name].param)
    ours = oracle.Parameter(param, MODES[name], seed=SEED, first=first)
    optimizer = optimizer_of(way, parameters([param]), MODES[name], amsgrad=True, seed=SEED)
    for count in (0, 2**32 + 5):  # of updates so far
        ours.step_count = count
        for param in params_of(optimizer):
            optimizer.state[param].get("step", torch.zeros(())).fill_(count)
        grad = torch.randn(param.shape).to(param.dtype)
        ours.step(grad, oracle.Settings(amsgrad=True))
        run(optimizer, [[grad]])
    assert_equals_the_oracle(optimizer, [ours.streams(amsgrad=True)])


@ways
def test_groups_may_store_otherwise(way: str) -> None:
    names = ["bf16 + 8, 8-bit moments by chance", "bf16, 8-bit moments by chance", "bf16 + 16, bf16 moments", "bf16"]
    params = [torch.randn(5000).bfloat16() for _ in range(2 * len(names))]
    groups = [
        {"params": parameters(params[2 * i : 2 * i + 2]), **MODES[name].options()} for i, name in enumerate(names)
    ]
    ours = [oracle.Parameter(param, MODES[names[i // 2]], i, SEED) for i, param in enumerate(params)]
    optimizer = optimizer_of(way, groups, Mode(), seed=SEED)
    for step in range(3):
        grads = [None if (i + step) % 5 == 0 else torch.randn(5000).bfloat16() for i in range(len(params))]
        for parameter, grad in zip(ours, grads, strict=True):
            if grad is not None:
                parameter.step(grad, oracle.Settings())
        run(optimizer, [grads])
    assert_equals_the_oracle(optimizer, [parameter.streams() for parameter in ours])


@ways
@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.master_weight_bits])
def test_a_zero_written_over_a_parameter_voids_its_low_bits(name: str, way: str) -> None:
    params, rounds = started(name)
    optimizer = optimizer_of(way, parameters(params), MODES[name], lr=1e-2, seed=SEED)
    ours = [oracle.Parameter(param, MODES[name], ordinal, SEED) for ordinal, param in enumerate(params)]
    for grads in rounds[:3]:
        for param, parameter, grad in zip(params_of(optimizer), ours, grads, strict=True):
            parameter.param[::3] = 0
            param.data.view(-1)[::3] = 0.0
            parameter.step(grad, oracle.Settings(lr=1e-2))
        run(optimizer, [grads])
    assert all(param.isfinite().all() for param in params_of(optimizer))
    assert_equals_the_oracle(optimizer, [parameter.streams() for parameter in ours])


@pytest.mark.slow
def test_every_master_weight_of_32_bits_survives_an_update_of_nothing() -> None:
    rows = 64
    every = torch.arange(2**16).to(torch.int16)
    lows = every.repeat(rows, 1)
    param = torch.nn.Parameter(torch.zeros(rows, 2**16, dtype=torch.bfloat16))
    param.grad = torch.zeros_like(param)
    optimizer = optimizer_of(WAYS[0], [param], Mode(torch.bfloat16, 32), lr=0.0)
    optimizer.step()
    high, low = param.data.view(torch.int16), optimizer.state[param]["master_low"]
    given = torch.empty_like(high)
    for highs in every.split(rows):
        given.copy_(highs[:, None].expand(-1, 2**16))
        high.copy_(given)
        low.copy_(lows)
        optimizer.step()
        if not (torch.equal(high, given) and torch.equal(low, lows)):
            # What no weight is stored as: NaNs with low bits, and zeros with those of a NaN.
            assert (((highs & 0x7FFF) >= 0x7F80) | (highs & 0x7FFF == 0)).any()
            kept = codecs.split(codecs.master(given.view(torch.bfloat16).flatten(), lows.flatten()), torch.int16)
            assert same_bits([param.flatten(), low.flatten()], kept)


@modes
def test_the_number_of_threads_changes_no_bit(name: str, restored_threads: None) -> None:
    params, rounds = started(name)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        optimizer = optimizer_of(WAYS[0], parameters(params), MODES[name], lr=1e-2, seed=SEED)
        assert_equals_the_oracle(run(optimizer, rounds), expected(name, "plain"))


@modes
def test_a_replay_rounds_as_a_step(name: str) -> None:
    params, rounds = started(name)
    optimizer = optimizer_of(NAME, parameters(params), MODES[name], lr=1e-2, seed=SEED)
    run(optimizer, rounds[:1])
    static = [torch.empty_like(grad) for grad in rounds[0]]
    set_grads(params_of(optimizer), static)
    graph = captured_step(optimizer)
    for grads in rounds[1:]:
        for grad, value in zip(static, grads, strict=True):
            grad.copy_(value)
        graph.replay()
    assert_equals_the_oracle(optimizer, expected(name, "plain"))


@modes
def test_a_checkpoint_in_float32_goes_on_with_the_same_bits(name: str) -> None:
    params, rounds = started(name)
    first = run(optimizer_of(WAYS[0], parameters(params), MODES[name], lr=1e-2, seed=SEED), rounds[:3])
    saved = through_a_file(first.state_dict())
    second = optimizer_of(WAYS[0], parameters(params_of(first)), MODES[name], lr=1e-2, seed=SEED)
    second.load_state_dict(saved)
    assert same_bits(snapshot(run(first, rounds[3:])), snapshot(run(second, rounds[3:])))


@pytest.mark.parametrize("name", [name for name, mode in MODES.items() if mode.stochastic_rounding])
def test_chance_is_another_for_each_tensor_and_seed(name: str) -> None:
    param, grad = torch.randn(5000).to(MODES[name].param), torch.randn(5000).to(MODES[name].param)

    def codes(seed: int) -> list[list[Tensor]]:
        optimizer = optimizer_of(WAYS[0], parameters([param, param]), MODES[name], lr=1e-2, seed=seed)
        run(optimizer, [[grad.clone(), grad.clone()]])
        return [[each.detach(), *optimizer.state[each].values()] for each in params_of(optimizer)]

    (first, second), again, other = codes(0), codes(0), codes(2**32)
    assert same_bits(first, again[0])
    assert same_bits(second, again[1])
    assert not same_bits(first, second)
    assert not same_bits(first, other[0])
