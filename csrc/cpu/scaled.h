// Moments in 8 bits, block by block. Included once for each instruction set.
#pragma once

#include "../codec.h"
#include "numbers.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

template <class Codec>
void decode_scaled(const Codec* __restrict__ from, float scale, float* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = decoded(from[i], scale);
  }
}

// `from` and `scales` begin at a block of scales.
template <class Codec>
void decode_scaled(const Codec* from, const float* scales, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kScaleBlock <= n; i += kScaleBlock) {
    decode_scaled(from + i, scales[i / kScaleBlock], to + i, kScaleBlock);
  }
  if (i < n) {
    decode_scaled(from + i, scales[i / kScaleBlock], to + i, n - i);
  }
}

uint32_t largest_magnitude(const float* from) {
  uint32_t largest = kSmallestScale;
  for (int64_t i = 0; i < kScaleBlock; ++i) {
    const uint32_t magnitude = magnitude_bits(from[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

void encode_one(float value, float inverse, float chance, Squared8& out) {
  const float share = fabsf(value) * inverse;
  encode(value, share, sqrtf(share), chance, out);
}
void encode_one(float value, float inverse, float chance, Fourth8& out) {
  const float share = fabsf(value) * inverse;
  encode(share, sqrtf(sqrtf(share)), chance, out);
}

// Calls f(k) for each of some vectors that are worked on at once, so that none waits for another's results.
constexpr int kAtOnce = 4;
template <class F>
void each(const F& f) {
#pragma GCC unroll 4
  for (int k = 0; k < kAtOnce; ++k) {
    f(k);
  }
}

Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// A number that is added to this one is rounded to a whole number, which the lower bits of the sum are.
constexpr float kWhole = 0x1.8p23f;
constexpr int32_t kWholeBits = 0x4b400000;

// As encode() of codec.h, for values whose scale is finite: the codes of what has these shares, plus
// kWholeBits. The rough roots, times kSteps codes, may be off by 0.4. `share_at` is the share at a place
// between codes.
template <int kSteps, class F>
void round_shares(const Floats (&shares)[kAtOnce], const Floats (&rough_roots)[kAtOnce],
                  const uint16_t* numbers, const F& share_at, Ints (&codes)[kAtOnce]) {
  Floats chance[kAtOnce];  // and 128: of bits, 128.0 with a number in its lower half is 128 + number / 65,536
  Floats whole[kAtOnce];
  Floats places[kAtOnce];
  each([&](int k) { chance[k] = (Floats)(widened(vector_at<Halves>(numbers + k * kWidth)) | 0x43000000); });
  each([&](int k) { whole[k] = fused(rough_roots[k], Floats{} + static_cast<float>(kSteps), chance[k]); });
  each([&](int k) { whole[k] += kWhole - 129.0f; });
  each([&](int k) { places[k] = (whole[k] - (kWhole - 129.0f)) - chance[k]; });  // exact
  each([&](int k) { places[k] = share_at(places[k]); });
  each([&](int k) { codes[k] = places[k] <= shares[k] ? (Ints)whole[k] + 1 : (Ints)whole[k]; });
}

void encode_several(const float* from, float inverse, const uint16_t* numbers, Squared8* to) {
  Floats shares[kAtOnce];
  Floats roots[kAtOnce];
  Ints codes[kAtOnce];
  each([&](int k) { shares[k] = magnitude(vector_at<Floats>(from + k * kWidth)) * inverse; });
  each([&](int k) { roots[k] = rough_root(shares[k]); });
  round_shares<127>(shares, roots, numbers, [](Floats place) { return squared_share(place); }, codes);
  each([&](int k) { codes[k] = at_most(at_least(codes[k], kWholeBits), kWholeBits + 127); });
  each([&](int k) {
    const Ints sign = vector_at<Ints>(from + k * kWidth) >> 31;  // -1 of a negative value
    store_bytes((codes[k] ^ sign) - sign, to + k * kWidth);
  });
}

void encode_several(const float* from, float inverse, const uint16_t* numbers, Fourth8* to) {
  Floats shares[kAtOnce];
  Floats roots[kAtOnce];
  Ints codes[kAtOnce];
  each([&](int k) { shares[k] = vector_at<Floats>(from + k * kWidth) * inverse; });  // which has no sign
  each([&](int k) { roots[k] = rough_fourth_root(shares[k]); });
  round_shares<255>(shares, roots, numbers, [](Floats place) { return fourth_share(place); }, codes);
  each([&](int k) { codes[k] = at_most(at_least(codes[k], kWholeBits + 2), kWholeBits + 255); });
  each([&](int k) { store_bytes(codes[k], to + k * kWidth); });
}

// The codes of one scale's elements.
template <class Codec>
void encode_block(const float* __restrict__ from, Codec* __restrict__ to, float scale, float inverse,
                  const uint16_t* __restrict__ numbers) {
  if (!(scale < INFINITY)) {
    for (int64_t i = 0; i < kScaleBlock; ++i) {
      encode_one(from[i], inverse, static_cast<float>(numbers[i]) * 0x1p-16f, to[i]);
    }
    return;
  }
  for (int64_t i = 0; i < kScaleBlock; i += kAtOnce * kWidth) {
    encode_several(from + i, inverse, numbers + i, to + i);
  }
}

// n elements, kBlock at most. All scales come first: each takes long to compute, and none waits for another.
template <class Codec>
void encode_scaled(const float* from, Codec* to, float* scales, const uint16_t* numbers, int64_t n) {
  const int64_t whole = n / kScaleBlock;
  float inverses[kBlock / kScaleBlock];
  for (int64_t k = 0; k < whole; ++k) {
    scales[k] = scale_of(largest_magnitude(from + k * kScaleBlock));
    inverses[k] = inverse_of(scales[k]);
  }
  for (int64_t k = 0; k < whole; ++k) {
    const int64_t i = k * kScaleBlock;
    encode_block(from + i, to + i, scales[k], inverses[k], numbers + i);
  }
  if (const int64_t i = whole * kScaleBlock; i < n) {  // the end of a tensor
    alignas(64) float padded[kScaleBlock] = {};
    Codec codes[kScaleBlock];
    memcpy(padded, from + i, static_cast<size_t>(n - i) * sizeof(float));
    scales[whole] = scale_of(largest_magnitude(padded));
    encode_block(padded, codes, scales[whole], inverse_of(scales[whole]), numbers + i);
    memcpy(to + i, codes, static_cast<size_t>(n - i));
  }
}

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
