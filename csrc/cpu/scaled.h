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

struct Rounding {
  Floats shares[kAtOnce];
  Floats less[kAtOnce];  // chance - 1
  Ints codes[kAtOnce];

  explicit Rounding(const uint16_t* numbers) {
    // Of bits, 128.0 with a number in its lower half is 128 + number / 65,536.
    each([&](int k) { less[k] = (Floats)(widened(vector_at<Halves>(numbers + k * kWidth)) | 0x43000000); });
    each([&](int k) { less[k] -= 129.0f; });
  }

  // The codes, of which the rough ones may be off by 0.4. `share_at` is the share at a place between codes.
  template <class F>
  void round(Floats (&rough)[kAtOnce], const F& share_at) {
    Floats places[kAtOnce];
    each([&](int k) { rough[k] += less[k]; });
    each([&](int k) { codes[k] = nearest(rough[k]); });
    each([&](int k) { places[k] = __builtin_convertvector(codes[k], Floats); });
    each([&](int k) { places[k] -= less[k]; });
    each([&](int k) { places[k] = share_at(places[k]); });
    each([&](int k) { codes[k] = places[k] <= shares[k] ? codes[k] + 1 : codes[k]; });
  }
};

// As encode() of codec.h, for values whose scale is finite.
void encode_several(const float* from, float inverse, const uint16_t* numbers, Squared8* to) {
  Rounding r(numbers);
  Floats rough[kAtOnce];
  each([&](int k) { r.shares[k] = magnitude(vector_at<Floats>(from + k * kWidth)) * inverse; });
  each([&](int k) { rough[k] = rough_root(r.shares[k]); });
  each([&](int k) { rough[k] *= 127.0f; });
  r.round(rough, [](Floats place) { return squared_share(place); });
  each([&](int k) { r.codes[k] = at_most(at_least(r.codes[k], 0), 127); });
  each([&](int k) {
    const Ints sign = vector_at<Ints>(from + k * kWidth) >> 31;  // -1 of a negative value
    store_narrowed((r.codes[k] ^ sign) - sign, reinterpret_cast<int8_t*>(to + k * kWidth));
  });
}

void encode_several(const float* from, float inverse, const uint16_t* numbers, Fourth8* to) {
  Rounding r(numbers);
  Floats rough[kAtOnce];
  each([&](int k) { r.shares[k] = vector_at<Floats>(from + k * kWidth) * inverse; });  // which has no sign
  each([&](int k) { rough[k] = rough_fourth_root(r.shares[k]); });
  each([&](int k) { rough[k] *= 255.0f; });
  r.round(rough, [](Floats place) { return fourth_share(place); });
  each([&](int k) { r.codes[k] = at_least(r.codes[k], 2); });
  each([&](int k) {
    store_narrowed(r.codes[k], reinterpret_cast<uint8_t*>(to + k * kWidth));
  });  // 255 at most
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
