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

// The scale of n elements, and their codes.
template <class Codec>
float scale_of(const float* from, int64_t n) {
  uint32_t largest = Codec::kSmallestScale;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = magnitude_bits(from[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return nexus::scale_of(largest);
}

template <class Codec>
void encode_block(const float* __restrict__ from, float squared, const uint16_t* __restrict__ numbers,
                  Codec* __restrict__ to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    encode(from[i], squared, numbers[i], to[i]);
  }
}

// n elements, kBlock at most. All scales come first: each takes long to compute, and none waits for another.
template <class Codec>
void encode_scaled(const float* from, Codec* to, float* scales, const uint16_t* numbers, int64_t n) {
  const int64_t whole = n / kScaleBlock;
  float squared[kBlock / kScaleBlock];
  for (int64_t k = 0; k < whole; ++k) {
    scales[k] = scale_of<Codec>(from + k * kScaleBlock, kScaleBlock);
    squared[k] = squared_steps<Codec>(scales[k]);
  }
  for (int64_t k = 0; k < whole; ++k) {
    const int64_t i = k * kScaleBlock;
    encode_block(from + i, squared[k], numbers + i, to + i, kScaleBlock);
  }
  if (const int64_t i = whole * kScaleBlock; i < n) {  // the end of a tensor
    scales[whole] = scale_of<Codec>(from + i, n - i);
    encode_block(from + i, squared_steps<Codec>(scales[whole]), numbers + i, to + i, n - i);
  }
}

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
