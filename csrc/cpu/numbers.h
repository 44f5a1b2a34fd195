// The random numbers of a block of elements: many draws (chance.h) at once. Included once for each
// instruction set.
#pragma once

#include "lanes.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

constexpr int64_t kBlock = 4 * kScaleBlock;

class Numbers {
 public:
  // Of the n elements that begin at `element` of the whole tensor.
  Numbers(const Chance& chance, int64_t element, int64_t n)
      : chance_(chance), first_(static_cast<uint64_t>(element / kDrawn)), skipped_(element % kDrawn), n_(n) {}

  // One for each element, from 0 to 65535.
  const uint16_t* drawn() {
    if (!drawn_) {
      draw();
      drawn_ = true;
    }
    return numbers_ + skipped_;
  }

 private:
  // Not inlined: what it is inlined into would leave it too few registers.
  __attribute__((noinline)) void draw() {
    const int64_t draws = (skipped_ + n_ + kDrawn - 1) / kDrawn;
    for (int64_t i = 0; i < draws; i += kTogether * kDraws) {
      Draws x[kTogether];
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTogether; ++k) {
        x[k] = unmixed(chance_, first_ + static_cast<uint64_t>(i + k * kDraws));
      }
#pragma GCC unroll 7
      for (int round = 0; round < kRounds; ++round) {
        const Key key = key_of(chance_, round);
#pragma GCC unroll 8
        for (int64_t k = 0; k < kTogether; ++k) {
          mix(x[k], key);
        }
      }
#pragma GCC unroll 8
      for (int64_t k = 0; k < kTogether; ++k) {
        store(x[k], numbers_ + (i + k * kDraws) * kDrawn);
      }
    }
  }

  const Chance& chance_;
  uint64_t first_;   // draw
  int64_t skipped_;  // numbers of the first draw that belong to elements before the block
  int64_t n_;
  bool drawn_ = false;
  alignas(64) uint16_t numbers_[kBlock + kTogether * kDraws * kDrawn];
};

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
