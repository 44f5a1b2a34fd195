// The random numbers of stochastic rounding: Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel
// random numbers: as easy as 1, 2, 3"). A number follows from its place alone (seed, tensor, element, stream,
// step), so that it is the same whatever the launch, the threads, the instruction set and the world size.
// Host and device; no torch.
#pragma once

#include "record.h"

namespace nexus {

// What all numbers of one tensor's update share.
struct Chance {
  uint32_t seed_low;
  uint32_t seed_high;
  uint32_t ordinal;  // of the tensor
  uint32_t step;     // the tensor's count of updates, this one included
};

NEXUS_FN Chance chance_of(const TensorRecord& tensor, int64_t seed, int64_t step) {
  const auto bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          static_cast<uint32_t>(tensor.ordinal), static_cast<uint32_t>(step)};
}

// Which stream of the tensor is rounded.
enum Rounded : uint32_t { kRoundedParam, kRoundedExpAvg, kRoundedExpAvgSq, kRoundedMaxExpAvgSq };

// Of the first moment. In 8 bits, it is rounded by the second's numbers: they are drawn once for both.
NEXUS_FN Rounded rounded_exp_avg(DType dtype) {
  return dtype == DType::kInt8 ? kRoundedExpAvgSq : kRoundedExpAvg;
}

// Adjacent elements whose numbers come from one draw.
constexpr int kDrawn = 8;

struct Draw {
  uint32_t words[kDrawn / 2];
};

NEXUS_FN void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// The draw for elements [8 * eighth, 8 * eighth + 8) of the whole tensor.
NEXUS_FN Draw draw(const Chance& chance, Rounded stream, uint64_t eighth) {
  uint32_t a = static_cast<uint32_t>(eighth);
  uint32_t b = chance.ordinal;
  uint32_t c = stream | static_cast<uint32_t>(eighth >> 32) << 8;
  uint32_t d = chance.step;
  uint32_t key_low = chance.seed_low;
  uint32_t key_high = chance.seed_high;
#ifndef __CUDACC__  // nvcc unrolls it unasked
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    uint32_t a_high, a_low, c_high, c_low;
    multiply(a, 0xd2511f53u, a_high, a_low);
    multiply(c, 0xcd9e8d57u, c_high, c_low);
    a = c_high ^ b ^ key_low;
    b = c_low;
    c = a_high ^ d ^ key_high;
    d = a_low;
    key_low += 0x9e3779b9u;
    key_high += 0xbb67ae85u;
  }
  return {{a, b, c, d}};
}

// The number of element k of a draw, in 16 bits.
NEXUS_FN uint32_t number(const Draw& draw, int k) { return draw.words[k / 2] >> (k % 2 * 16) & 0xffffu; }

}  // namespace nexus
