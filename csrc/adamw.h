// The AdamW update of one element (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), and what it
// takes.
//
// No loads, no stores: a kernel reads an element of each stream, calls adamw(), and writes them back. T is
// the type of the arithmetic: float, or double for float64 parameters. Host and device; no torch.
#pragma once

#include "hyperparameters.h"

namespace nexus {

// What the update of one tensor needs, computed once a step in float64 and rounded once to T.
template <class T>
struct Coefficients {
  T grad_multiplier;  // clip coefficient / gradient scale; negative to maximize
  T decay;            // lr * weight_decay
  T one_minus_beta1;
  T beta2;
  T one_minus_beta2;
  T step_size;       // lr / (1 - beta1^t)
  T inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^t)
  T eps;
  T average_weight;  // of the new parameter in its average: 1 in a parameter's first update
};

// `t` counts this update: 1 for a parameter's first.
NEXUS_FN Coefficients<double> coefficients(const Row& row, double t) {
  const double bias1 = 1.0 - pow(row.beta1, t);
  const double bias2 = 1.0 - pow(row.beta2, t);
  return {row.grad_multiplier,
          row.lr * row.weight_decay,
          1.0 - row.beta1,
          row.beta2,
          1.0 - row.beta2,
          row.lr / bias1,
          1.0 / sqrt(bias2),
          row.eps,
          t == 1.0 ? 1.0 : row.average_weight};
}

template <class T>
NEXUS_FN Coefficients<T> rounded(const Coefficients<double>& c) {
  return {static_cast<T>(c.grad_multiplier), static_cast<T>(c.decay),
          static_cast<T>(c.one_minus_beta1), static_cast<T>(c.beta2),
          static_cast<T>(c.one_minus_beta2), static_cast<T>(c.step_size),
          static_cast<T>(c.inv_sqrt_bias2),  static_cast<T>(c.eps),
          static_cast<T>(c.average_weight)};
}

NEXUS_FN float root(float x) { return sqrtf(x); }
NEXUS_FN double root(double x) { return sqrt(x); }

template <bool kAmsgrad, class T>
NEXUS_FN void adamw(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq,
                    const Coefficients<T>& c) {
  const T g = c.grad_multiplier * grad;
  const T m = exp_avg + c.one_minus_beta1 * (g - exp_avg);
  const T v = c.beta2 * exp_avg_sq + c.one_minus_beta2 * g * g;
  T largest_v = v;
  if (kAmsgrad) {
    // Written so that a NaN in either operand is kept, as torch.maximum keeps it.
    largest_v = (v > max_exp_avg_sq || v != v) ? v : max_exp_avg_sq;
    max_exp_avg_sq = largest_v;
  }
  const T denominator = root(largest_v) * c.inv_sqrt_bias2 + c.eps;
  // Not (1 - decay) * param: in float32 that factor is off by up to 3e-8, the same way in every step and for
  // every parameter, and is 1 where the decay is smaller than that. An infinite parameter stays what it is.
  const T decayed = param - param == T(0) ? c.decay * param : T(0);
  param -= decayed + c.step_size * m / denominator;
  exp_avg = m;
  exp_avg_sq = v;
}

// The average of a parameter's values, once there is another. A weight of 1 copies, to the bit.
template <class T>
NEXUS_FN T averaged(T average, T param, T weight) {
  const T moved = average + weight * (param - average);
  return weight == T(1) ? param : moved;
}

}  // namespace nexus
