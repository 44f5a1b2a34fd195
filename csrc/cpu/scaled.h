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

// The chance of a step, in [0, 1), that decides on an element's code, of its number.
float chance_of(uint16_t number) { return static_cast<float>(number) * 0x1p-16f; }

// In bits, 128 + a number of 16 bits / 65,536 is 128.0 with that number in its lower half.
Floats chances_of(Halves numbers) { return (Floats)(widened(numbers) | 0x43000000) - 128.0f; }

void encode_one(float value, float inverse, float chance, Squared8& out) {
  const float share = fabsf(value) * inverse;
  encode(value, share, sqrtf(share), chance, out);
}
void encode_one(float value, float inverse, float chance, Fourth8& out) {
  const float share = fabsf(value) * inverse;
  encode(share, sqrtf(sqrtf(share)), chance, out);
}

Floats as_floats(Ints x) { return __builtin_convertvector(x, Floats); }

Ints clamped(Ints x, int32_t least, int32_t most) {
  const Ints low = x > least ? x : Ints{} + least;
  return low < most ? low : Ints{} + most;
}

// As encode() of codec.h, for values whose scale is finite.
void encode_several(Floats value, float inverse, Floats chance, Squared8* to) {
  const Floats share = (Floats)((Ints)value & 0x7fffffff) * inverse;
  const Floats less = chance - 1.0f;  // exact
  const Ints below = nearest(rough_root(share) * 127.0f + less);
  const Ints code = clamped(squared_share(as_floats(below) - less) <= share ? below + 1 : below, 0, 127);
  store_narrowed((Ints)value < 0 ? -code : code, reinterpret_cast<int8_t*>(to));
}
void encode_several(Floats value, float inverse, Floats chance, Fourth8* to) {
  const Floats share = value * inverse;  // a second moment has no sign
  const Floats less = chance - 1.0f;
  const Ints below = nearest(rough_fourth_root(share) * 255.0f + less);
  const Ints code = fourth_share(as_floats(below) - less) <= share ? below + 1 : below;
  store_narrowed(clamped(code, 2, 255), reinterpret_cast<uint8_t*>(to));
}

// The codes of one scale's elements.
template <class Codec>
void encode_block(const float* __restrict__ from, Codec* __restrict__ to, float scale, float inverse,
                  const uint16_t* numbers) {
  if (!(scale < INFINITY)) {
    for (int64_t i = 0; i < kScaleBlock; ++i) {
      encode_one(from[i], inverse, chance_of(numbers[i]), to[i]);
    }
    return;
  }
#pragma GCC unroll 2
  for (int64_t i = 0; i < kScaleBlock; i += kWidth) {
    encode_several(vector_at<Floats>(from + i), inverse, chances_of(vector_at<Halves>(numbers + i)), to + i);
  }
}

// n elements, kBlock at most, each by its number. All scales come first: each takes long to compute, and none
// waits for another.
template <class Codec>
void encode_scaled(const float* from, Codec* to, float* scales, const uint16_t* numbers, int64_t n) {
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
    encode_block(from + i, to + i, scales[k], inverses[k], numbers + i);
  }
  if (const int64_t i = whole * kScaleBlock; i < n) {
    memcpy(padded, from + i, static_cast<size_t>(n - i) * sizeof(float));
    scales[whole] = scale_of(largest_magnitude(padded));
    encode_block(padded, codes, scales[whole], inverse_of(scales[whole]), numbers + i);
    memcpy(to + i, codes, static_cast<size_t>(n - i));
  }
}

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
