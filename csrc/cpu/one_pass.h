// The update of a tensor in one pass over all its streams, each element of which is decoded, updated and
// encoded in registers: memory brings the streams side by side while the pass computes. For the ways of
// storing them that the compiler is told of here. Included once for each instruction set.
#pragma once

#include <type_traits>

#include "../adamw.h"
#include "../codec.h"
#include "kernels.h"
#include "numbers.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

// The types of a parameter and its gradient, of the low bits of its master weight (where that is float, it
// has none), and of both moments; and whether `stochastic_rounding` is set.
template <class Weight, class Low, class Moment, bool kByChance>
struct OnePass {
  static constexpr bool kHasLow = std::is_same_v<Low, Low16>;
  static constexpr bool kNarrowMoments = std::is_same_v<Moment, BFloat16>;
  static constexpr bool kChanceOfWeight = kByChance && !kHasLow && std::is_same_v<Weight, BFloat16>;

  static void update(const TensorRecord& tensor, int64_t begin, int64_t n,
                     const uint16_t* __restrict__ numbers, const Coefficients<float> c) {
    Weight* __restrict__ param = static_cast<Weight*>(tensor.param) + begin;
    const Weight* __restrict__ grad = static_cast<const Weight*>(tensor.grad) + begin;
    Low* __restrict__ low = static_cast<Low*>(tensor.master_low) + (kHasLow ? begin : 0);
    Moment* __restrict__ exp_avg = static_cast<Moment*>(tensor.exp_avg) + begin;
    Moment* __restrict__ exp_avg_sq = static_cast<Moment*>(tensor.exp_avg_sq) + begin;
    NEXUS_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t number = kChanceOfWeight || kNarrowMoments ? numbers[i] : 0;
      float m = decoded(exp_avg[i]);
      float v = decoded(exp_avg_sq[i]);
      float p, unused = 0.0f;
      if constexpr (kHasLow) {
        p = decoded(param[i], low[i]);
      } else {
        p = decoded(param[i]);
      }
      adamw<false>(p, decoded(grad[i]), m, v, unused, c);
      if constexpr (kHasLow) {
        encode(p, param[i], low[i]);
      } else if constexpr (kChanceOfWeight) {
        encode(p, swapped(number), param[i]);
      } else {
        encode(p, param[i]);
      }
      if constexpr (kByChance && kNarrowMoments) {
        encode(m, number, exp_avg[i]);
      } else {
        encode(m, exp_avg[i]);
      }
      if constexpr (kNarrowMoments) {
        encode(v, number, exp_avg_sq[i]);  // to nearest, it would freeze
      } else {
        encode(v, exp_avg_sq[i]);
      }
    }
  }

  static void run(const TensorRecord& tensor, const Chance& chance, const Coefficients<float>& c,
                  int64_t begin, int64_t count) {
    for (const int64_t end = begin + count; begin < end; begin += kBlock) {
      const int64_t n = end - begin < kBlock ? end - begin : kBlock;
      Numbers numbers(chance, tensor.first + begin, n);
      update(tensor, begin, n, kChanceOfWeight || kNarrowMoments ? numbers.drawn() : nullptr, c);
    }
  }
};

// Whether there is such a pass; if so, it has been made.
inline bool update_in_one_pass(const TensorRecord& tensor, const Chance& chance, const Coefficients<float>& c,
                               int64_t begin, int64_t count) {
  const bool is_narrow = tensor.param_dtype == DType::kBFloat16;
  const bool has_low = tensor.master_low_dtype == DType::kInt16;
  const bool has_narrow_moments = tensor.exp_avg_dtype == DType::kBFloat16;
  if (tensor.max_exp_avg_sq != nullptr || tensor.average != nullptr ||
      tensor.grad_dtype != tensor.param_dtype || tensor.exp_avg_sq_dtype != tensor.exp_avg_dtype ||
      !(is_narrow || tensor.param_dtype == DType::kFloat32) ||
      !(has_low || tensor.master_low_dtype == DType::kOther) ||
      !(has_narrow_moments || tensor.exp_avg_dtype == DType::kFloat32)) {
    return false;
  }
  const auto run = [&](auto weight, auto low, auto moment) {
    using Nearest = OnePass<decltype(weight), decltype(low), decltype(moment), false>;
    using Chancy = OnePass<decltype(weight), decltype(low), decltype(moment), true>;
    (tensor.stochastic_rounding != 0 ? Chancy::run : Nearest::run)(tensor, chance, c, begin, count);
  };
  const auto run_moments = [&](auto weight, auto low) {
    has_narrow_moments ? run(weight, low, BFloat16()) : run(weight, low, float());
  };
  if (!is_narrow) {
    run_moments(float(), float());
  } else if (has_low) {
    run_moments(BFloat16(), Low16());
  } else {
    run_moments(BFloat16(), float());
  }
  return true;
}

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
