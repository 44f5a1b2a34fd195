// bfloat16 and float16 as bits, to and from float32: round to nearest even, NaN stays NaN. Host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace nexus {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

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

NEXUS_FN float to_float(BFloat16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

NEXUS_FN void from_float(float value, BFloat16& out) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;  // quiet, with the payload's upper bits
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

NEXUS_FN float to_float(Float16 x) {
  // Shifted into place, the exponent is short by 112; a multiplication mends it, exactly, subnormals
  // included.
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float finite = float_of_bits(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;  // infinities and NaNs
  const uint32_t bits = (x.bits & 0x7c00u) == 0x7c00u ? special : bits_of_float(finite);
  return float_of_bits(bits | sign);
}

NEXUS_FN void from_float(float value, Float16& out) {
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

}  // namespace nexus
