// The random numbers of a block of elements: many draws (chance.h) at once. Included once for each
// instruction set.
#pragma once

#include "../chance.h"
#include "lanes.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

constexpr int64_t kBlock = 8 * kScaleBlock;

constexpr int64_t kWords = sizeof(Words) / sizeof(uint64_t);
constexpr int64_t kTogether = 8;  // vectors whose rounds hide each other's latency

class Numbers {
 public:
  // Those of the n elements that begin at `element` of the whole tensor.
  Numbers(const Chance& chance, Rounded stream, int64_t element, int64_t n) : skipped_(element % kDrawn) {
    const auto first = static_cast<uint64_t>(element / kDrawn);
    const int64_t draws = (skipped_ + n + kDrawn - 1) / kDrawn;
    for (int64_t i = 0; i < draws; i += kTogether * kWords) {
      Mixture<Words> drawn[kTogether];
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTogether; ++k) {
        drawn[k] = unmixed(chance, stream, kPlaces + (first + static_cast<uint64_t>(i + k * kWords)));
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
  static void store(const Mixture<Words>& drawn, uint16_t* to) {
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
