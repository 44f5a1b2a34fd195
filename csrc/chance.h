// The random numbers of stochastic rounding: Philox4x32-7 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random
// numbers: as easy as 1, 2, 3": the fewest rounds that pass every test of BigCrush). A number follows from
// its place alone (seed, tensor, element, step), so that it is the same whatever the launch, the threads, the
// instruction set and the world size. Host and device; no torch.
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

// Adjacent elements whose numbers come from one draw.
constexpr int kDrawn = 8;

struct Draw {
  uint32_t words[kDrawn / 2];
};

// An element has one number, of 16 bits, by which all its moments are rounded. Its parameter is rounded by
// the same bytes in the other order: what rounds the one up says next to nothing of the other.
NEXUS_FN uint32_t swapped(uint32_t number) {
  const auto half = static_cast<uint16_t>(number);
  return static_cast<uint16_t>(half >> 8 | half << 8);
}

// Four words of 32 bits: at first the place of a draw, at last its numbers. Of a Word that is uint64_t or a
// vector of such, the lower half counts, and the upper may have anything.
template <class Word>
struct Mixture {
  Word a, b, c, d;
};

constexpr int kRounds = 7;

struct Key {
  uint64_t low, high;
};

NEXUS_FN Key key_of(const Chance& chance, int round) {
  const auto i = static_cast<uint32_t>(round);
  return {chance.seed_low + i * 0x9e3779b9u, chance.seed_high + i * 0xbb67ae85u};
}

constexpr uint32_t kFirstFactor = 0xd2511f53;
constexpr uint32_t kSecondFactor = 0xcd9e8d57;

// One round. `product` multiplies the lower half of each word by a number.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Word, class F>
NEXUS_FN void mix(Mixture<Word>& x, const Key& key, const F& product) {
  const Word first = product(x.a, kFirstFactor);
  const Word second = product(x.c, kSecondFactor);
  x.a = (second >> 32) ^ x.b ^ key.low;
  x.b = second;
  x.c = (first >> 32) ^ x.d ^ key.high;
  x.d = first;
}

// For elements [8 * eighth, 8 * eighth + 8) of the whole tensor.
template <class Word>
NEXUS_FN Mixture<Word> unmixed(const Chance& chance, Word eighth) {
  const Word none = eighth ^ eighth;
  return {eighth, none + uint64_t{chance.ordinal}, eighth >> 32, none + uint64_t{chance.step}};
}

NEXUS_FN Draw draw(const Chance& chance, uint64_t eighth) {
  const auto product = [](uint64_t a, uint32_t b) { return uint64_t{static_cast<uint32_t>(a)} * b; };
  Mixture<uint64_t> x = unmixed(chance, eighth);
  for (int round = 0; round < kRounds; ++round) {
    mix(x, key_of(chance, round), product);
  }
  return {{static_cast<uint32_t>(x.a), static_cast<uint32_t>(x.b), static_cast<uint32_t>(x.c),
           static_cast<uint32_t>(x.d)}};
}

}  // namespace nexus
