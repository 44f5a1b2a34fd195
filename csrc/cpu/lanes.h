// Vectors as wide as the instruction set has them, and what of them the compiler does not find by itself.
// Included once for each instruction set.
#pragma once

#ifdef NEXUS_X86
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace nexus::cpu::NEXUS_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kWidth = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

template <class Vector, class T>
Vector vector_at(const T* from) {
  Vector vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

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

// These are off by 0.02% at most, in the other instruction sets by 0.1%. Of 0 and infinity they are exact.
Floats rough_root(Floats x) { return _mm512_maskz_rcp14_ps(0xffff, _mm512_maskz_rsqrt14_ps(0xffff, x)); }
Floats rough_fourth_root(Floats x) {
  return _mm512_maskz_rsqrt14_ps(0xffff, _mm512_maskz_rsqrt14_ps(0xffff, x));
}

Ints widened(Halves x) { return (Ints)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }

Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

Ints at_least(Ints x, int32_t least) {
  return (Ints)_mm512_maskz_max_epi32(0xffff, (__m512i)x, _mm512_set1_epi32(least));
}
Ints at_most(Ints x, int32_t most) {
  return (Ints)_mm512_maskz_min_epi32(0xffff, (__m512i)x, _mm512_set1_epi32(most));
}

void store_bytes(Ints x, void* to) {
  _mm_storeu_si128((__m128i*)to, _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)x));
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

Floats rough_root(Floats x) { return _mm256_rcp_ps(_mm256_rsqrt_ps(x)); }
Floats rough_fourth_root(Floats x) { return _mm256_rsqrt_ps(_mm256_rsqrt_ps(x)); }
Ints widened(Halves x) { return (Ints)_mm256_cvtepu16_epi32((__m128i)x); }

Floats fused(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

void store_bytes(Ints x, void* to) {
  const __m256i bytes = (__m256i)(x & 0xff);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storeu_si64(to, _mm_packus_epi16(halves, halves));
}

Ints at_least(Ints x, int32_t least) { return x > least ? x : Ints{} + least; }
Ints at_most(Ints x, int32_t most) { return x < most ? x : Ints{} + most; }

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

Floats rough_root(Floats x) {
  for (int i = 0; i < kWidth; ++i) {
    x[i] = sqrtf(x[i]);
  }
  return x;
}
Floats rough_fourth_root(Floats x) { return rough_root(rough_root(x)); }
Ints widened(Halves x) { return __builtin_convertvector(x, Ints); }

Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }

Ints at_least(Ints x, int32_t least) { return x > least ? x : Ints{} + least; }
Ints at_most(Ints x, int32_t most) { return x < most ? x : Ints{} + most; }

void store_bytes(Ints x, void* to) {
  for (int i = 0; i < kWidth; ++i) {
    static_cast<uint8_t*>(to)[i] = static_cast<uint8_t>(x[i]);
  }
}
#endif

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
