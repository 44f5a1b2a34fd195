// Vectors of words, as wide as the instruction set has them, and what of them the compiler does not find by
// itself. Included once for each instruction set.
#pragma once

#ifdef NEXUS_X86
#include <immintrin.h>
#endif

#include <cstdint>

namespace nexus::cpu::NEXUS_ISA {
namespace {

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

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
