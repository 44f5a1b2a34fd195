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

// Chance of a step, in [0, 1).
struct ToNearest {
  Floats at(int64_t) const { return Floats{} + 0.5f; }
  ToNearest from(int64_t) const { return {}; }
};
struct ByChance {
  const uint16_t* numbers;
  Floats at(int64_t i) const {
    return __builtin_convertvector(widened(vector_at<Halves>(numbers + i)), Floats) * 0x1p-16f;
  }
  ByChance from(int64_t i) const { return {numbers + i}; }
};

Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// The formulas of codec.h, for a vector of values whose scale is finite.
Ints encoded(Floats value, float inverse, const Squared8*, ToNearest, int64_t) {
  const Floats share = magnitude(value) * inverse;
  const Ints below = __builtin_convertvector(rough_root(share) * 127.0f, Ints);
  const Ints code = below - (squared_share(__builtin_convertvector(below, Floats) + 0.5f) <= share);
  return (Ints)value < 0 ? -code : code;
}

template <class Chance>
Ints encoded(Floats value, float inverse, const Fourth8*, Chance chances, int64_t i) {
  const Floats chance = chances.at(i);
  const Floats share = magnitude(value) * inverse;
  const Ints rough = __builtin_convertvector(rough_fourth_root(share) * 255.0f + (chance - 0.5f), Ints);
  const Ints positive = rough > 1 ? rough : Ints{} + 1;
  const Ints below = positive < 254 ? positive : Ints{} + 254;
  return below - (fourth_share(__builtin_convertvector(below + 1, Floats) - chance) <= share);
}

void encode_one(float value, float inverse, ToNearest, int64_t, Squared8& out) {
  encode(value, inverse, out);
}
void encode_one(float value, float inverse, ToNearest, int64_t, Fourth8& out) {
  encode(value, inverse, 0.5f, out);
}
void encode_one(float value, float inverse, ByChance chances, int64_t i, Fourth8& out) {
  encode(value, inverse, static_cast<float>(chances.numbers[i]) * 0x1p-16f, out);
}

// The codes of one scale's elements.
template <class Codec, class Chance>
void encode_block(const float* __restrict__ from, Codec* __restrict__ to, float scale, float inverse,
                  const Chance& chances) {
  if (!(scale < INFINITY)) {
    for (int64_t i = 0; i < kScaleBlock; ++i) {
      encode_one(from[i], inverse, chances, i, to[i]);
    }
    return;
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < kScaleBlock; i += kWidth) {
    const Bytes codes = narrowed(encoded(vector_at<Floats>(from + i), inverse, to, chances, i));
    memcpy(to + i, &codes, sizeof codes);
  }
}

// n elements, kBlock at most. All scales come first: each takes long to compute, and none waits for another.
template <class Codec, class Chance = ToNearest>
void encode_scaled(const float* from, Codec* to, float* scales, int64_t n, const Chance& chances = {}) {
  const int64_t whole = n / kScaleBlock;
  alignas(64) float padded[kScaleBlock] = {};  // the elements that a tensor has beyond its last whole block
  Codec codes[kScaleBlock];
  float inverses[kBlock / kScaleBlock];
  for (int64_t k = 0; k < whole; ++k) {
    scales[k] = scale_of(largest_magnitude(from + k * kScaleBlock));
    inverses[k] = inverse_of(scales[k]);
  }
  for (int64_t k = 0; k < whole; ++k) {
    const int64_t i = k * kScaleBlock;
    encode_block(from + i, to + i, scales[k], inverses[k], chances.from(i));
  }
  if (const int64_t i = whole * kScaleBlock; i < n) {
    memcpy(padded, from + i, static_cast<size_t>(n - i) * sizeof(float));
    scales[whole] = scale_of(largest_magnitude(padded));
    encode_block(padded, codes, scales[whole], inverse_of(scales[whole]), chances.from(i));
    memcpy(to + i, codes, static_cast<size_t>(n - i));
  }
}

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
