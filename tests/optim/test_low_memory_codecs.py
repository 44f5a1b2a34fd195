"""How streams are stored in fewer bits: the codecs of plain PyTorch beside the oracle, and what they promise."""

from __future__ import annotations

import math
from collections.abc import Iterator

import low_memory_oracle as oracle
import numpy as np
import pytest
import torch
from low_memory_cases import VALUES, around_thresholds, values
from low_memory_oracle import Array
from torch import Tensor

from nexus.backends import codecs

SCALED = {"int8": (torch.int8, 2, 127), "uint8": (torch.uint8, 4, 255)}
by_chance = pytest.mark.parametrize("by_chance", [False, True], ids=["to nearest", "by chance"])


def chance(numel: int, seed: int = 0, ordinal: int = 3, step: int = 5, first: int = 0) -> Tensor:
    return codecs.Chance(seed, ordinal, torch.tensor(float(step), dtype=torch.float64), first).of(numel)


def same(found: Tensor, expected: Array) -> bool:
    return not oracle.unequal(oracle.stored_bits(found), expected).any()


# Chance.


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"seed": 2**32}, {"ordinal": 4}, {"ordinal": 2**31}, {"step": 6}, {"first": 8}],
    ids=str,
)
def test_all_that_tells_two_updates_apart_changes_chance(change: dict[str, int]) -> None:
    one, other = chance(40_000), chance(40_000, **change)
    assert torch.corrcoef(torch.stack([one, other]).double())[0, 1].abs() < 5 / 40_000**0.5
    assert (one == other).sum() < 10


@pytest.mark.parametrize("first", [0, 1, 5, 8, 1003, 2**35 - 3, 2**40 + 3])
def test_chance_is_that_of_the_place_in_the_whole_tensor(first: int) -> None:
    seed, ordinal, step = 0x1234_5678_9ABC_DEF0, 2**20 + 1, 2**33 + 1
    found = chance(29, seed, ordinal, step, first)
    assert found.tolist() == oracle.Chance(seed, ordinal, step, first, 29).of_moments().tolist()
    assert found[5:].tolist() == chance(24, seed, ordinal, step, first + 5).tolist()


def test_chance_is_even() -> None:
    counts = torch.bincount(chance(2**20) >> 8, minlength=256).double()
    expected = 2**20 / 256
    assert ((counts - expected).square() / expected).sum() < 255 + 5 * (2 * 255) ** 0.5  # chi squared


# Master weights.


def patterns() -> Iterator[Tensor]:
    """Of float32, 2**25: each upper half with 256 lower ones, each lower half with 256 upper ones."""
    every = torch.arange(2**16)
    some = torch.cat([every[:64], every[2**15 - 64 : 2**15 + 64], every[-64:]])
    special = torch.tensor([0x0000, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7F81, 0x7FFF])
    special = torch.cat([special, special + 2**15, torch.randint(2**16, (242,))])
    for high, low in ((every, some), (special, every)):
        for part in high.split(len(high) // 8):
            yield ((part << 16)[:, None] | low).flatten().to(torch.int32).view(torch.float32)


def test_a_master_weight_of_32_bits_is_exact() -> None:
    for x in patterns():
        high, low = codecs.split(x, torch.int16)
        nan = x.isnan()
        back = codecs.master(high, low)
        assert torch.equal(torch.where(nan, 0, back.view(torch.int32)), torch.where(nan, 0, x.view(torch.int32)))
        assert back[nan].isnan().all()
        assert high[nan].isnan().all()
        assert not low[nan].any()
        # To nearest, ties away from zero: what torch rounds to even, from the next number if that is a tie.
        away = torch.where(x.view(torch.int32) & 0xFFFF == 0x8000, (x.view(torch.int32) + 1).view(torch.float32), x)
        assert torch.equal(high[~nan].view(torch.int16), away.bfloat16()[~nan].view(torch.int16))


@pytest.mark.parametrize("case", VALUES)
@by_chance
def test_master_weights_equal_the_oracle(case: str, by_chance: bool) -> None:
    x = values(case)
    drawn = chance(len(x)) if by_chance else None
    by = None if drawn is None else drawn.numpy()
    for dtype, master_bits in ((torch.int16, 32), (torch.uint8, 24)):
        high, low = codecs.split(torch.from_numpy(x), dtype, drawn)
        assert all(map(same, (high, low), oracle.split(x, master_bits, by)))
        back = codecs.master(high, low)
        assert same(back, oracle.joined(*oracle.split(x, master_bits, by)))
        assert all(
            map(torch.equal, codecs.split(back.nan_to_num(1.0), dtype), codecs.split(back.nan_to_num(1.0), dtype))
        )
    if drawn is not None:
        assert same(codecs.bfloat16_by_chance(torch.from_numpy(x), drawn), oracle.bf16(x, by))


# Moments.


def encoded(name: str, x: Array, drawn: Tensor | None) -> tuple[tuple[Tensor, Tensor | None], tuple[Array, Array]]:
    """By the codec, and by the oracle."""
    found = codecs.encoded(torch.from_numpy(x), SCALED[name][0], drawn)
    by = None if drawn is None else drawn.numpy()
    return found, oracle.encode_int8(x, by) if name == "int8" else oracle.encode_uint8(x, by)


@pytest.mark.parametrize("case", [*VALUES, "around thresholds", "a short block", "empty"])
@pytest.mark.parametrize("name", SCALED)
@by_chance
def test_moments_equal_the_oracle(case: str, name: str, by_chance: bool) -> None:
    _, power, most = SCALED[name]
    numel = {"a short block": 3, "empty": 0, "around thresholds": 128 * 200}.get(case, 10_007)
    drawn = chance(numel) if by_chance else None
    x = values(case, numel) if case != "a short block" else values("numbers", numel)
    if case == "around thresholds":
        x = around_thresholds(power, most, np.full(numel, 0.5) if drawn is None else drawn.numpy() / 2**16)
    x = x if name == "int8" else np.abs(x)
    (codes, scale), expected = encoded(name, x, drawn)
    assert scale is not None
    assert same(codes, expected[0])
    assert same(scale, expected[1])
    decode = oracle.decode_int8 if name == "int8" else oracle.decode_uint8
    with oracle.quiet():
        assert same(codecs.decoded(codes, scale), decode(*expected))


@pytest.mark.parametrize("name", SCALED)
def test_what_is_decoded_is_encoded_to_the_same_codes(name: str) -> None:
    """Every code beside the largest one, under scales of every size; and beside none, under the smallest scale."""
    dtype, _, most = SCALED[name]
    smallest = torch.tensor(float(oracle.SMALLEST_SCALES[most]))
    largest = torch.tensor(torch.finfo(torch.float32).max)
    largest = largest if name == "int8" else largest.sqrt()
    exponents = torch.empty(3_000).uniform_(float(smallest.log2()), float(largest.log2()))
    every = torch.arange(-most if name == "int8" else 2, most + 1).repeat(2)[: 127 * 3].view(3, 127)
    blocks = torch.cat([every, torch.full((3, 1), most)], dim=1)
    codes = blocks.flatten().repeat(len(exponents) + 2)
    scale = torch.cat([exponents.exp2().clamp(smallest, largest), torch.stack([smallest, largest])])
    scale = scale.repeat_interleave(3)
    few = every.clamp(-100, 100).flatten()[:300]
    codes, scale = torch.cat([codes, few]).to(dtype), torch.cat([scale, smallest.expand(3)])
    again, scale_again = codecs.encoded(codecs.decoded(codes, scale), dtype)
    assert scale_again is not None
    assert torch.equal(scale_again, scale)
    assert torch.equal(again, codes)


def on_average(found: Tensor, expected: float, spacing: float) -> bool:
    """Whether roundings to two neighbours are right within four standard errors."""
    return abs(float(found.double().mean()) - expected) < 4 * 0.5 * spacing / len(found) ** 0.5


@pytest.mark.parametrize("x", [1.0009, -3.14159, 1e-20, 65500.0])
def test_rounding_by_chance_is_right_on_average(x: float) -> None:
    drawn = chance(2**18)
    value = torch.full((2**18,), x)
    exact = float(value[0].double())
    spacing = 2.0 ** (math.frexp(x)[1] - 8)
    assert on_average(codecs.bfloat16_by_chance(value, drawn), exact, spacing)
    assert on_average(codecs.master(*codecs.split(value, torch.uint8, drawn)), exact, spacing / 256)
    assert not on_average(value.bfloat16(), exact, spacing)
    shares = torch.full_like(value, 0.3)
    shares[:: codecs.SCALE_BLOCK] = 1.0
    codes, _ = codecs.encoded(shares * value.abs(), torch.uint8, drawn)
    assert on_average(codes[shares != 1.0], 255 * 0.3**0.25, 1.0)


@pytest.mark.parametrize("bits", codecs.LOW_DTYPES)
def test_low_bits_are_those_of_a_weight_that_rounds_to_the_parameter(bits: int) -> None:
    dtype = codecs.LOW_DTYPES[bits]
    value = torch.from_numpy(values("wide"))
    high = value.bfloat16()
    found, fits = codecs.low_bits(value, high, dtype)
    assert fits.all()
    error = (codecs.master(high, found) - value).abs()
    # Ties, which torch rounds to even, are one unit off.
    assert (error <= value.abs() * 2.0 ** (9 - bits)).all()
    assert (error == 0.0).float().mean() > (0.999 if bits == 32 else 0.0)
    assert not codecs.low_bits(value, high * 1.02, dtype)[1].any()
