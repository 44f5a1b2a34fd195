// Square and fourth roots that are off by less than 0.1%, for the codecs of 8 bits, which decide by an exact
// comparison which code it is. Included once for each instruction set.
#pragma once

#include "../codec.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

#if defined(__AVX512F__)
struct Lanes16 {
  static constexpr int kCount = 16;
  using Vector = __m512;
  static Vector load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
  static Vector inverse(Vector x) { return _mm512_maskz_rcp14_ps(0xffff, x); }
  static Vector inverse_root(Vector x) { return _mm512_maskz_rsqrt14_ps(0xffff, x); }
};
using RoughLanes = Lanes16;
#elif defined(__AVX2__)
struct Lanes8 {
  static constexpr int kCount = 8;
  using Vector = __m256;
  static Vector load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
  static Vector inverse(Vector x) { return _mm256_rcp_ps(x); }
  static Vector inverse_root(Vector x) { return _mm256_rsqrt_ps(x); }
};
using RoughLanes = Lanes8;
#endif

// Of 0 and infinity, the roots are exact: each estimate turns one into the other.
#if defined(__AVX2__)
void rough_roots(const float* from, float* to) {
  for (int64_t i = 0; i < kScaleBlock; i += RoughLanes::kCount) {
    RoughLanes::store(to + i, RoughLanes::inverse(RoughLanes::inverse_root(RoughLanes::load(from + i))));
  }
}

void rough_fourth_roots(const float* from, float* to) {
  for (int64_t i = 0; i < kScaleBlock; i += RoughLanes::kCount) {
    RoughLanes::store(to + i, RoughLanes::inverse_root(RoughLanes::inverse_root(RoughLanes::load(from + i))));
  }
}
#else
void rough_roots(const float* from, float* to) {
  for (int64_t i = 0; i < kScaleBlock; ++i) {
    to[i] = sqrtf(from[i]);
  }
}

void rough_fourth_roots(const float* from, float* to) {
  for (int64_t i = 0; i < kScaleBlock; ++i) {
    to[i] = sqrtf(sqrtf(from[i]));
  }
}
#endif

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
