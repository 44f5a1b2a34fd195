// The sum of squares of a gradient, in sixteen float64 lanes (four vectors of four) that are added in a fixed
// order: the same bits whatever the instruction set. Included once for each instruction set.
#pragma once

#include "../codec.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

constexpr int kLanes = 4;

#ifdef NEXUS_NEON  // GCC would keep a vector of four in memory
struct Lanes {
  float64x2_t lower, upper;

  double operator[](int i) const { return i < 2 ? lower[i] : upper[i - 2]; }
  Lanes operator+(const Lanes& other) const { return {lower + other.lower, upper + other.upper}; }
};

void add_square(double x, Lanes& sum) { sum.lower[0] += x * x; }

void add_squares(const double* x, Lanes& sum) {
  const float64x2_t lower = vld1q_f64(x);
  const float64x2_t upper = vld1q_f64(x + 2);
  sum = sum + Lanes{lower * lower, upper * upper};
}

void add_squares(const float* x, Lanes& sum) {
  const float32x4_t values = vld1q_f32(x);
  const float64x2_t lower = vcvt_f64_f32(vget_low_f32(values));
  const float64x2_t upper = vcvt_high_f64_f32(values);
  sum = sum + Lanes{lower * lower, upper * upper};
}

#else
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

void add_square(double x, Lanes& sum) { sum[0] += x * x; }

template <class T>
void add_squares(const T* x, Lanes& sum) {
  typedef T Stored __attribute__((vector_size(kLanes * sizeof(T))));
  Stored values;
  __builtin_memcpy(&values, x, sizeof values);
  const Lanes wide = __builtin_convertvector(values, Lanes);
  sum += wide * wide;
}
#endif

struct Squares {
  Lanes sums[4] = {};

  template <class T>
  void add(const T* x, int64_t n) {
    Lanes a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      add_squares(x + i, a);
      add_squares(x + i + kLanes, b);
      add_squares(x + i + 2 * kLanes, c);
      add_squares(x + i + 3 * kLanes, d);
    }
    for (; i < n; ++i) {
      add_square(static_cast<double>(x[i]), a);
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
  }

  double total() const {
    const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
