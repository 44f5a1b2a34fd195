"""The oracle of low-memory state itself: published and hand-computed values, the formulas in float64, torch."""

from __future__ import annotations

import low_memory_oracle as oracle
import numpy as np
import pytest
import torch
from references import Float64AdamW, make_grads, make_params

# Random123's known answers for seven rounds: counter, key, the four words.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), PHILOX)
def test_chance_is_philox(counter: str, key: str, answer: str) -> None:
    found = oracle.philox(np.array([words(counter)]), tuple(words(key)))
    assert found.tolist() == [words(answer)]


def test_elements_share_a_counter_in_halves() -> None:
    seed, ordinal, step, first = 0x299F31D0_A4093822, 7, 9, 2**40 + 3
    counter = [(first // 8) % 2**32, ordinal, 2**5, step]  # 2**40 / 8 = 2**37
    a, b, c, d = oracle.philox(np.array([counter]), (0xA4093822, 0x299F31D0))[0].tolist()
    halves = [a & 0xFFFF, a >> 16, b & 0xFFFF, b >> 16, c & 0xFFFF, c >> 16, d & 0xFFFF, d >> 16]
    chance = oracle.Chance(seed, ordinal, step, first, numel=5)
    assert chance.of_moments().tolist() == halves[3:]
    assert chance.of_param().tolist() == [half % 256 * 256 + half // 256 for half in halves[3:]]


# bits of a float32; of the bfloat16 and the low bits of 32 and of 24: ties, both sides, the ends, NaN.
SPLITS = [
    (0x3F808000, (0x3F81, 0x8000), (0x3F81, 0x80)),
    (0x3F807FFF, (0x3F80, 0x7FFF), (0x3F81, 0x80)),
    (0x3F807F7F, (0x3F80, 0x7F7F), (0x3F80, 0x7F)),
    (0x80000000, (0x8000, 0x0000), (0x8000, 0x00)),
    (0x7F7FFFFF, (0x7F80, 0xFFFF), (0x7F80, 0x00)),
    (0xFF800000, (0xFF80, 0x0000), (0xFF80, 0x00)),
    (0x7FFFFFFF, (0x7FC0, 0x0000), (0x7FC0, 0x00)),
    (0xFF800001, (0x7FC0, 0x0000), (0x7FC0, 0x00)),
]


@pytest.mark.parametrize(("bits", "in_32", "in_24"), SPLITS)
def test_master_weights_are_split_as_by_hand(bits: int, in_32: tuple[int, int], in_24: tuple[int, int]) -> None:
    x = oracle.from_bits(np.array([bits]))
    for master_bits, expected in ((32, in_32), (24, in_24)):
        high, low = oracle.split(x, master_bits)
        assert (int(high[0]), int(low[0]) & 0xFFFF) == expected


def test_codes_are_the_rounded_roots() -> None:
    values = np.array([1.0, -1 / 16, 1e-9, 0.0], dtype=np.float32)
    codes, scale = oracle.encode_int8(values)
    assert (codes.tolist(), scale.tolist()) == ([127, -32, 0, 0], [1.0])
    assert oracle.decode_int8(codes, scale).tolist() == pytest.approx([1.0, -((32 / 127) ** 2), 0.0, 0.0])
    codes, scale = oracle.encode_uint8(np.array([1.0, 1 / 81, 1e-12, 0.0], dtype=np.float32))
    assert codes.tolist() == [255, 85, 2, 2]
    assert oracle.decode_uint8(codes, scale).tolist() == pytest.approx([1.0, 1 / 81, (2 / 255) ** 4, (2 / 255) ** 4])


@pytest.mark.parametrize("largest", [1e-27, 1.0, 3e38])
def test_codes_equal_the_roots_in_float64(largest: float) -> None:
    shares = np.random.default_rng(0).random(50_000) ** 3
    shares[::128] = 1.0
    values = (shares * largest).astype(np.float32)
    chance = np.random.default_rng(1).integers(0, 2**16, len(values))
    exact = values.astype(np.float64) / np.repeat(values[::128], 128)[: len(values)].astype(np.float64)
    for codes, roots in [
        (oracle.encode_int8(values)[0], 127 * exact**0.5 + 0.5),
        (oracle.encode_int8(values, chance)[0], np.clip(127 * exact**0.5 + chance / 2**16, 0, 127)),
        (oracle.encode_uint8(values)[0], np.clip(255 * exact**0.25 + 0.5, 2, 255)),
        (oracle.encode_uint8(values, chance)[0], np.clip(255 * exact**0.25 + chance / 2**16, 2, 255)),
    ]:
        sure = np.abs(roots - np.round(roots)) > 1e-4
        assert sure.mean() > 0.98  # each block's largest is not
        assert (codes == np.floor(roots))[sure].all()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "eps": 1e-3}])
def test_the_update_is_torchs(options: dict[str, float]) -> None:
    params = make_params([(1000,)])
    reference = Float64AdamW(params, lr=1e-2, **options)
    ours = oracle.Parameter(params[0], oracle.Mode())
    for _ in range(20):
        grads = make_grads(params)
        reference.step(grads)
        ours.step(grads[0], oracle.Settings(lr=1e-2, **options))
    state = reference.state(0)
    expected = {"param": reference.params[0], **{name: state[name] for name in state if name != "step"}}
    found = ours.streams(amsgrad="amsgrad" in options)
    assert set(found) == set(expected)
    for name, stored in found.items():
        torch.testing.assert_close(torch.from_numpy(stored).double(), expected[name].detach(), rtol=1e-6, atol=1e-6)
