// As many draws of random numbers (chance.h) at once as the instruction set has lanes: what the compiler does
// not find by itself. Included once for each instruction set.
#pragma once

#include <cstring>

#include "../chance.h"
#include "../codec.h"
#ifdef NEXUS_X86
#include <immintrin.h>
#endif

namespace nexus::cpu::NEXUS_ISA {
namespace {

#ifdef NEXUS_NEON
constexpr int64_t kDraws = 4;     // in a vector
constexpr int64_t kTogether = 4;  // vectors whose rounds hide each other's latency
using Draws = Mixture<uint32x4_t>;

// From the one that is `first` in the whole tensor.
Draws unmixed(const Chance& chance, uint64_t first) {
  const uint64x2_t begin = {first, first + 1};
  const uint32x4_t lower = vreinterpretq_u32_u64(begin);
  const uint32x4_t upper = vreinterpretq_u32_u64(vaddq_u64(begin, vdupq_n_u64(2)));
  return {vuzp1q_u32(lower, upper), vdupq_n_u32(chance.ordinal), vuzp2q_u32(lower, upper),
          vdupq_n_u32(chance.step)};
}

// The lower and the upper halves of four products.
uint32x4x2_t product(uint32x4_t a, uint32_t b) {
  const uint32x4_t lower = vreinterpretq_u32_u64(vmull_n_u32(vget_low_u32(a), b));
  const uint32x4_t upper = vreinterpretq_u32_u64(vmull_high_n_u32(a, b));
  return vuzpq_u32(lower, upper);
}

// nexus::mix, of words of 32 bits.
void mix(Draws& x, const Key& key) {
  const uint32x4x2_t first = product(x.a, kFirstFactor);
  const uint32x4x2_t second = product(x.c, kSecondFactor);
  x.a = second.val[1] ^ x.b ^ static_cast<uint32_t>(key.low);
  x.b = second.val[0];
  x.c = first.val[1] ^ x.d ^ static_cast<uint32_t>(key.high);
  x.d = first.val[0];
}

void store(const Draws& x, uint16_t* to) {
  const uint32x4x4_t words = {{x.a, x.b, x.c, x.d}};
  vst4q_u32(reinterpret_cast<uint32_t*>(to), words);  // draw by draw
}

#else

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__)
constexpr Words kPlaces = {0, 1, 2, 3, 4, 5, 6, 7};

// Of the lower halves.
Words product(Words a, uint32_t b) {
  return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
}

// Of two vectors, element by element.
Words lower_interleaved(Words a, Words b) {
  return (Words)_mm512_permutex2var_epi64((__m512i)a, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                                          (__m512i)b);
}
Words upper_interleaved(Words a, Words b) {
  return (Words)_mm512_permutex2var_epi64((__m512i)a, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15),
                                          (__m512i)b);
}

#elif defined(__AVX2__)
constexpr Words kPlaces = {0, 1, 2, 3};

Words product(Words a, uint32_t b) { return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }

Words lower_interleaved(Words a, Words b) {
  const __m256i outer = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  const __m256i inner = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  return (Words)_mm256_permute2x128_si256(outer, inner, 0x20);
}
Words upper_interleaved(Words a, Words b) {
  const __m256i outer = _mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
  const __m256i inner = _mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
  return (Words)_mm256_permute2x128_si256(outer, inner, 0x31);
}

#else
constexpr Words kPlaces = {0, 1};

Words product(Words a, uint32_t b) {
#ifdef NEXUS_X86
  return (Words)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & uint64_t{0xffffffff}) * uint64_t{b};
#endif
}

Words lower_interleaved(Words a, Words b) { return Words{a[0], b[0]}; }
Words upper_interleaved(Words a, Words b) { return Words{a[1], b[1]}; }
#endif

constexpr int64_t kDraws = sizeof(Words) / sizeof(uint64_t);
constexpr int64_t kTogether = 8;
using Draws = Mixture<Words>;

Draws unmixed(const Chance& chance, uint64_t first) { return nexus::unmixed(chance, kPlaces + first); }

void mix(Draws& x, const Key& key) { nexus::mix(x, key, product); }

void store(const Draws& x, uint16_t* to) {
  constexpr uint64_t kHalf = 0xffffffff;
  const Words first = (x.a & kHalf) | x.b << 32;
  const Words second = (x.c & kHalf) | x.d << 32;
  const Words both[] = {lower_interleaved(first, second), upper_interleaved(first, second)};
  memcpy(to, both, sizeof both);
}
#endif

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
