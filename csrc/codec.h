// How a stream is stored, said here and nowhere else. A codec is the type of what is stored of an element: it
// has a decoded() to the type of the arithmetic, and an encode() from it, which a load() and a store() call
// for adjacent elements. float16 and bfloat16 are stored rounded to nearest even, or bfloat16 up or down by
// chance; NaN stays NaN. Host and device; no torch.
#pragma once

#include <cmath>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(__CUDACC__)
#define NEXUS_NEON 1
#include <arm_neon.h>
#endif

#include "record.h"

namespace nexus {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type of the arithmetic on a parameter that is stored as `Codec`; its moments have that type too.
template <class Codec>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

// The result of f for a value of the codec that `dtype` names.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class F>
NEXUS_FN auto with_codec(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat16:
      return f(Float16());
    case DType::kFloat32:
    case DType::kInt8:  // from here on, of no parameter and no gradient
    case DType::kUInt8:
    case DType::kInt16:
    case DType::kOther:
      break;
  }
  return f(float());
}

NEXUS_FN float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

NEXUS_FN uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

NEXUS_FN float decoded(float x) { return x; }
NEXUS_FN double decoded(double x) { return x; }
NEXUS_FN float decoded(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

NEXUS_FN float decoded(Float16 x) {
  // Shifted into place, the exponent is short by 112; a multiplication mends it, exactly, subnormals
  // included.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float finite = float_of_bits(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaNs
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? special : bits_of_float(finite);
  return float_of_bits(bits | sign);
}

NEXUS_FN void encode(float value, float& out) { out = value; }
NEXUS_FN void encode(double value, double& out) { out = value; }

// Of NaN, those that stay a NaN's when they are rounded.
NEXUS_FN uint32_t bits_to_round(float value) { return value != value ? 0x7fc00000u : bits_of_float(value); }

NEXUS_FN void encode(float value, BFloat16& out) {
  const uint32_t bits = bits_to_round(value);
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// `chance` of 65,536 decides between the numbers below and above: the mean is `value`.
NEXUS_FN void encode(float value, uint32_t chance, BFloat16& out) {
  out.bits = static_cast<uint16_t>((bits_to_round(value) + chance) >> 16);
}

NEXUS_FN void encode(float value, Float16& out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {  // NaN
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 lets the adder round to multiples of 2^-24
    half = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | sign);
}

// The low bits of a float32 master weight. With all 16 of them, the parameter beside them in bfloat16 is the
// weight rounded with ties away from zero, and the weight is exact; with the upper 8, the weight has 24 bits.
struct Low16 {
  uint16_t bits;
};
struct Low8 {
  uint8_t bits;
};

// What is nearest to the weight in bfloat16 is the parameter, and the low bits are the distance from it,
// signed. Beside a zero that somebody has written over the parameter, a negative one would make a NaN: there
// it counts as 0.
NEXUS_FN float weight_of(BFloat16 high, int32_t distance) {
  const uint32_t upper = high.bits;
  const int32_t positive = distance < 0 ? 0 : distance;
  const int32_t kept = (upper & 0x7fffu) == 0 ? positive : distance;
  return float_of_bits((upper << 16) + static_cast<uint32_t>(kept));
}

NEXUS_FN float decoded(BFloat16 high, Low16 low) { return weight_of(high, static_cast<int16_t>(low.bits)); }
NEXUS_FN float decoded(BFloat16 high, Low8 low) {
  return weight_of(high, static_cast<int8_t>(low.bits) * 256);
}

NEXUS_FN void encode(float value, BFloat16& high, Low16& low) {
  const uint32_t bits = bits_to_round(value);
  high.bits = static_cast<uint16_t>((bits + 0x8000u) >> 16);
  low.bits = static_cast<uint16_t>(bits);
}

// `chance` of 256 decides between the numbers below and above; 128 rounds to nearest.
NEXUS_FN void encode(float value, uint32_t chance, BFloat16& high, Low8& low) {
  const uint32_t rounded = bits_to_round(value) + chance;
  high.bits = static_cast<uint16_t>((rounded + 0x8000u) >> 16);
  low.bits = static_cast<uint8_t>(rounded >> 8);
}

// A moment in 8 bits: codes beside one float32 scale for each kScaleBlock elements. The first moment is the
// scale, the largest magnitude among them, times the signed square of code / 127. Of the second moment, such
// a number is the root, and the scale the largest root; its codes are 2 at least: a second moment that became
// 0 beside a first moment that did not would make the update thousands of times too large, and one of code 1
// ten times.
struct Squared8 {
  static constexpr float kSteps = 127.0f;
  static constexpr uint32_t kSmallestScale = 0x10800000u;  // 2^-94, as bits
  int8_t code;
};
struct Fourth8 {
  static constexpr float kSteps = 255.0f;
  static constexpr uint32_t kSmallestScale = 0x28000000u;  // 2^-47
  uint8_t code;
};

NEXUS_FN uint32_t magnitude_bits(float value) { return bits_of_float(value) & 0x7fffffffu; }

// The scale of elements whose largest magnitude has these bits: for a Squared8 of the values, for a Fourth8
// of their roots. A NaN among them is the largest. With the codec's smallest one, no moment is subnormal.
NEXUS_FN float scale_of(uint32_t magnitude) {
  return float_of_bits(magnitude > 0x7f800000u ? 0x7fc00000u : magnitude);
}

// What magnitudes are multiplied with before their root is taken: the largest is then at least all steps.
template <class Codec>
NEXUS_FN float squared_steps(float scale) {
  return float_of_bits(bits_of_float(Codec::kSteps * Codec::kSteps / scale) + 1u);
}

NEXUS_FN float decoded(Squared8 x, float scale) {
  const float root = static_cast<float>(x.code) * (1.0f / Squared8::kSteps);
  return root * fabsf(root) * scale;
}

NEXUS_FN float decoded(Fourth8 x, float scale) {
  const float fourth_root = static_cast<float>(x.code) * (1.0f / Fourth8::kSteps);
  const float root = fourth_root * fourth_root * scale;
  return root * root;
}

// The whole steps in the root of `square`, rounded up or down by chance: of 128 + chance / 65536, `chance` is
// the lower half of the bits. As many as there are codes, where there are more, or NaN.
template <class Codec>
NEXUS_FN int32_t steps_by_chance(float square, uint32_t chance) {
  const uint32_t sum = bits_of_float(sqrtf(square) + float_of_bits(0x43000000u | chance));
  const uint32_t most = bits_of_float(128.0f + Codec::kSteps);
  return static_cast<int32_t>(float_of_bits(sum < most ? sum : most)) - 128;
}

// `squared` is squared_steps() of the scale. Rounded to nearest, a first moment would never reach 0: a code
// below 10 stays the same when the moment shrinks by a tenth.
NEXUS_FN void encode(float value, float squared, uint32_t chance, Squared8& out) {
  const int32_t code = steps_by_chance<Squared8>(fabsf(value) * squared, chance);
  out.code = static_cast<int8_t>(value < 0.0f ? -code : code);
}

// Of a second moment, its root.
NEXUS_FN void encode(float root, float squared, uint32_t chance, Fourth8& out) {
  const int32_t code = steps_by_chance<Fourth8>(root * squared, chance);
  out.code = static_cast<uint8_t>(code < 2 ? 2 : code);
}

// n elements of a stream, as T, and back. Where n is a constant, they stay in registers.
template <class Codec, class T>
NEXUS_FN void load(const Codec* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<T>(decoded(from[i]));
  }
}

template <class Codec, class T>
NEXUS_FN void store(const T* from, Codec* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    encode(from[i], to[i]);
  }
}

// The processor's own conversion of eight adjacent numbers.
#if defined(__F16C__)
#define NEXUS_CONVERTS_HALVES 1
NEXUS_FN void widen(const Float16* from, float* to) {
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtph_ps(half));
}

NEXUS_FN void narrow(const float* from, Float16* to) {
  const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
}
#elif defined(NEXUS_NEON)
#define NEXUS_CONVERTS_HALVES 1
NEXUS_FN void widen(const Float16* from, float* to) {
  const float16x8_t half = vreinterpretq_f16_u16(vld1q_u16(&from->bits));
  vst1q_f32(to, vcvt_f32_f16(vget_low_f16(half)));
  vst1q_f32(to + 4, vcvt_high_f32_f16(half));
}

NEXUS_FN void narrow(const float* from, Float16* to) {
  const float16x4_t lower = vcvt_f16_f32(vld1q_f32(from));
  vst1q_u16(&to->bits, vreinterpretq_u16_f16(vcvt_high_f16_f32(lower, vld1q_f32(from + 4))));
}
#endif

#ifdef NEXUS_CONVERTS_HALVES
NEXUS_FN void load(const Float16* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    widen(from + i, to + i);
  }
  for (; i < n; ++i) {
    to[i] = decoded(from[i]);
  }
}

NEXUS_FN void store(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    narrow(from + i, to + i);
  }
  for (; i < n; ++i) {
    encode(from[i], to[i]);
  }
}
#endif

}  // namespace nexus
