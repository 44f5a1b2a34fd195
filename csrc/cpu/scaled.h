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

// A number that is added to this one is rounded to a whole number, which the lower bits of the sum are.
constexpr float kWhole = 0x1.8p23f;
constexpr int32_t kWholeBits = 0x4b400000;

// As encode() of codec.h, for a vector of values whose scale is finite: the codes, if they are in bounds. The
// rough root, times kSteps codes, may be off by 0.4. `share_at` gives the share at a place between codes.
template <int kSteps, class F>
Ints rounded_by_chance(Floats share, Floats rough_root, const uint16_t* numbers, const F& share_at) {
  // And 128: of bits, 128.0 with a number in its lower half is 128 + number / 65,536.
  const Floats chance = (Floats)(widened(vector_at<Halves>(numbers)) | 0x43000000);
  const Floats below = fused(rough_root, Floats{} + static_cast<float>(kSteps), chance) + (kWhole - 129.0f);
  const Floats place = (below - (kWhole - 129.0f)) - chance;  // exact
  const Ints code = (Ints)below - kWholeBits;
  return share_at(place) <= share ? code + 1 : code;
}

// As many elements as one vector has bytes.
void encode_vectors(const float* from, float inverse, const uint16_t* numbers, Squared8* to) {
  Ints bits[kPacked], code[kPacked];
  for (int k = 0; k < kPacked; ++k) {
    bits[k] = vector_at<Ints>(from + k * kWidth);
    const Floats share = (Floats)(bits[k] & 0x7fffffff) * inverse;
    code[k] = rounded_by_chance<127>(share, rough_root(share), numbers + k * kWidth,
                                     [](Floats place) { return squared_share(place); });
  }
  const Bytes any = packed(code);
  const Bytes bounded = any < 127 ? any : Bytes{} + 127;
  const Bytes negative = (Bytes)(packed_signed(bits) < 0);  // 255 of a negative value
  const Bytes codes = in_order((bounded ^ negative) - negative);
  memcpy(to, &codes, sizeof codes);
}

void encode_vectors(const float* from, float inverse, const uint16_t* numbers, Fourth8* to) {
  Ints code[kPacked];
  for (int k = 0; k < kPacked; ++k) {
    const Floats share = vector_at<Floats>(from + k * kWidth) * inverse;  // a second moment has no sign
    code[k] = rounded_by_chance<255>(share, rough_fourth_root(share), numbers + k * kWidth,
                                     [](Floats place) { return fourth_share(place); });
  }
  const Bytes any = packed(code);
  const Bytes codes = in_order(any > 2 ? any : Bytes{} + 2);
  memcpy(to, &codes, sizeof codes);
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
  for (int64_t i = 0; i < kScaleBlock; i += kVectorBytes) {
    encode_vectors(from + i, inverse, numbers + i, to + i);
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
