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

// Adjacent elements whose numbers come from one draw.
constexpr int kDrawn = 8;

// Four words of 32 bits, at first a counter, at last random. Of a Word, which is uint64_t or a vector of
// such, the lower half counts, and the upper may have anything.
template <class Word>
struct Draw {
  Word a, b, c, d;
};

constexpr int kRounds = 10;

// The key of a round, from 0 on.
struct Key {
  uint64_t low, high;
};

NEXUS_FN Key key_of(const Chance& chance, int round) {
  const auto i = static_cast<uint32_t>(round);
  return {chance.seed_low + i * 0x9e3779b9u, chance.seed_high + i * 0xbb67ae85u};
}

// `product` multiplies the lower half of each word by a number.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Word, class F>
NEXUS_FN void mix(Draw<Word>& draw, const Key& key, const F& product) {
  const Word first = product(draw.a, 0xd2511f53u);
  const Word second = product(draw.c, 0xcd9e8d57u);
  draw.a = (second >> 32) ^ draw.b ^ key.low;
  draw.b = second;
  draw.c = (first >> 32) ^ draw.d ^ key.high;
  draw.d = first;
}

// The counter for elements [8 * eighth, 8 * eighth + 8) of the whole tensor.
template <class Word>
NEXUS_FN Draw<Word> counter(const Chance& chance, Rounded stream, Word eighth) {
  const Word none = eighth ^ eighth;
  return {eighth, none + uint64_t{chance.ordinal}, (eighth >> 32 << 8) | uint64_t{stream},
          none + uint64_t{chance.step}};
}

// The draw for these elements: number(draw, k) is that of element k.
NEXUS_FN Draw<uint64_t> draw(const Chance& chance, Rounded stream, uint64_t eighth) {
  const auto product = [](uint64_t a, uint32_t b) { return uint64_t{static_cast<uint32_t>(a)} * b; };
  Draw<uint64_t> drawn = counter(chance, stream, eighth);
  for (int round = 0; round < kRounds; ++round) {
    mix(drawn, key_of(chance, round), product);
  }
  return drawn;
}

NEXUS_FN uint32_t number(const Draw<uint64_t>& drawn, int k) {
  const uint64_t word = k < 4 ? (k < 2 ? drawn.a : drawn.b) : (k < 6 ? drawn.c : drawn.d);
  return static_cast<uint32_t>(word) >> (k % 2 * 16) & 0xffffu;
}

}  // namespace nexus
