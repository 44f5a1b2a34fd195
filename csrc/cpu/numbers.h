// The random numbers of a block of elements: many draws (chance.h) at once. Included once for each
// instruction set.
#pragma once

#ifdef NEXUS_X86
#include <immintrin.h>
#endif

#include <cstring>

#include "../chance.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

constexpr int64_t kBlock = 4 * kScaleBlock;

#if defined(__AVX512F__)
typedef uint64_t Words __attribute__((vector_size(64)));
constexpr Words kPlaces = {0, 1, 2, 3, 4, 5, 6, 7};
constexpr Words kLower = {0, 8, 1, 9, 2, 10, 3, 11};  // of two vectors, element by element
constexpr Words kUpper = {4, 12, 5, 13, 6, 14, 7, 15};
Words product(Words a, uint32_t b) {
  return reinterpret_cast<Words>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
}
#elif defined(__AVX2__)
typedef uint64_t Words __attribute__((vector_size(32)));
constexpr Words kPlaces = {0, 1, 2, 3};
constexpr Words kLower = {0, 4, 1, 5};
constexpr Words kUpper = {2, 6, 3, 7};
Words product(Words a, uint32_t b) {
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
}
#else
typedef uint64_t Words __attribute__((vector_size(16)));
constexpr Words kPlaces = {0, 1};
constexpr Words kLower = {0, 2};
constexpr Words kUpper = {1, 3};
Words product(Words a, uint32_t b) {
#ifdef NEXUS_X86
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & uint64_t{0xffffffff}) * uint64_t{b};
#endif
}
#endif
constexpr int64_t kWords = sizeof(Words) / sizeof(uint64_t);
constexpr int64_t kTogether = 8;  // vectors whose rounds hide each other's latency

class Numbers {
 public:
  // Those of the n elements that begin at `element` of the whole tensor.
  Numbers(const Chance& chance, Rounded stream, int64_t element, int64_t n) : skipped_(element % kDrawn) {
    const auto first = static_cast<uint64_t>(element / kDrawn);
    const int64_t draws = (skipped_ + n + kDrawn - 1) / kDrawn;
    for (int64_t i = 0; i < draws; i += kTogether * kWords) {
      Draw<Words> drawn[kTogether];
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTogether; ++k) {
        drawn[k] = counter(chance, stream, kPlaces + (first + static_cast<uint64_t>(i + k * kWords)));
      }
      for (int round = 0; round < kRounds; ++round) {
        const Key key = key_of(chance, round);
#pragma GCC unroll 8
        for (int64_t k = 0; k < kTogether; ++k) {
          mix(drawn[k], key, product);
        }
      }
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTogether; ++k) {
        store(drawn[k], numbers_ + (i + k * kWords) * kDrawn);
      }
    }
  }

  // One for each element, from 0 to 65535.
  const uint16_t* begin() const { return numbers_ + skipped_; }

 private:
  static void store(const Draw<Words>& drawn, uint16_t* to) {
    constexpr uint64_t kHalf = 0xffffffff;
    const Words first = (drawn.a & kHalf) | drawn.b << 32;
    const Words second = (drawn.c & kHalf) | drawn.d << 32;
    const Words both[] = {__builtin_shuffle(first, second, kLower), __builtin_shuffle(first, second, kUpper)};
    memcpy(to, both, sizeof both);
  }

  int64_t skipped_;  // numbers of the first draw that belong to elements before the block
  alignas(64) uint16_t numbers_[kBlock + kTogether * kWords * kDrawn];
};

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
