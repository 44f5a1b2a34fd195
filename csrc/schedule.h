// The C++ formula of every curve, and the look-up of the segment in force at a step.
//
// A schedule reaches the kernels as a table of float64: layers, that are folded from left to right, of
// equally many rows of kColumns. The first row of a layer says what it is (LayerRow); its segments follow
// (SegmentRow), by ascending start, the first of which starts at step 0; then come its samples, if it has
// any. The segment in force at step t is the last one whose start is <= t, and it repeats, with its period,
// until the next one begins: one row is a whole train of cosine restarts. Its value is
//
//     low + weight(p) * (high - low),    p = ((t - start) mod period + offset) / span
//
// in the very order of operations of the Python oracle (nexus/schedules/curves.py), so that both agree bit
// for bit; a value that float64 cannot hold is the largest that it can. From a layer's repeat_start on, its
// repeat_length steps from there come again and again. Steps are exact integers up to 2^53 and never pass
// through float32. Host and device; no torch.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace nexus {

enum class Curve : int32_t {
  kConstant,
  kRise,
  kLinear,
  kCosine,
  kSqrt,
  kPower,
  kExponential,
  kStaircase,
  kInverse,
  kLog,
  kTanh,
  kSampled
};

enum class Op : int32_t { kFirst, kTimes, kPlus, kMin, kMax };

struct LayerRow {
  double op;
  double segments;
  double repeat_start;
  double repeat_length;
};

struct SegmentRow {
  double curve;
  double start;
  double period;
  double offset;
  double span;
  double high;
  double low;
  double k;
  double q;
};
constexpr int64_t kColumns = sizeof(SegmentRow) / sizeof(double);

// x^k, without the math library where IEEE operations give it.
NEXUS_FN double power(double x, double k) {
  return k == 1.0 ? x : k == 0.5 ? sqrt(x) : k == 2.0 ? x * x : pow(x, k);
}

// The value at place p of `count` samples, the last of which stays.
NEXUS_FN double sampled(const double* samples, double count, double p) {
  const double place = fmin(fmax(floor(p), 0.0), count - 1.0);
  const auto i = static_cast<int64_t>(place);
  const double rest = p - place;
  if (!(rest > 0.0 && rest < 1.0) || place == count - 1.0) {
    return samples[i];
  }
  return samples[i] + rest * (samples[i + 1] - samples[i]);
}

// `layer` points to the numbers of the segment's layer.
NEXUS_FN double curve_weight(const SegmentRow& row, double p, const double* layer) {
  constexpr double kHalfPi = 1.57079632679489661923;
  const double k = row.k;
  const double q = row.q;
  switch (static_cast<Curve>(static_cast<int32_t>(row.curve))) {
    case Curve::kConstant:
      return 1.0;
    case Curve::kRise:
      return p;
    case Curve::kLinear:
      return 1.0 - p;
    case Curve::kCosine: {
      const double root = cos(kHalfPi * power(p, k));
      return power(root * root, q);
    }
    case Curve::kSqrt:
      return 1.0 - sqrt(p);
    case Curve::kPower:
      return power(1.0 - power(p, k), q);
    case Curve::kExponential:
      return (power(q, p) - k) / (1.0 - k);
    case Curve::kStaircase:
      return power(q, floor(p));
    case Curve::kInverse:
      return 1.0 / power(1.0 + p, q);
    case Curve::kLog:
      return k * log(p);
    case Curve::kTanh:
      return 0.5 * (1.0 - tanh(k * (1.0 - p) + q * p));
    case Curve::kSampled:
      return sampled(layer + static_cast<int64_t>(k), q, p);
  }
  return NAN;  // no curve: a table is refused before it gets here
}

// Infinity times 0 would be NaN.
NEXUS_FN double bounded(double rate) { return rate > DBL_MAX ? DBL_MAX : rate; }

NEXUS_FN double layer_value(const double* layer, int64_t t) {
  const LayerRow& own = *reinterpret_cast<const LayerRow*>(layer);
  const auto repeat_start = static_cast<int64_t>(own.repeat_start);
  if (t >= repeat_start) {
    t = repeat_start + (t - repeat_start) % static_cast<int64_t>(own.repeat_length);
  }
  const auto* segments = reinterpret_cast<const SegmentRow*>(layer + kColumns);
  int64_t first = 0;
  auto last = static_cast<int64_t>(own.segments);  // the segment sought is in [first, last)
  while (last - first > 1) {
    const int64_t middle = first + (last - first) / 2;
    if (static_cast<int64_t>(segments[middle].start) <= t) {
      first = middle;
    } else {
      last = middle;
    }
  }
  const SegmentRow& row = segments[first];
  const int64_t position = (t - static_cast<int64_t>(row.start)) % static_cast<int64_t>(row.period);
  const double p = (static_cast<double>(position) + row.offset) / row.span;
  return bounded(row.low + curve_weight(row, p, layer) * (row.high - row.low));
}

NEXUS_FN double folded(Op op, double before, double value) {
  switch (op) {
    case Op::kFirst:
      return value;
    case Op::kTimes:
      return bounded(before * value);
    case Op::kPlus:
      return bounded(before + value);
    case Op::kMin:
      return value < before ? value : before;
    case Op::kMax:
      return value > before ? value : before;
  }
  return NAN;
}

// The schedule's value at step t >= 0. `table` holds `layers` layers of `rows` rows.
NEXUS_FN double evaluate_schedule(const double* table, int64_t layers, int64_t rows, int64_t t) {
  double value = 0.0;
  for (int64_t i = 0; i < layers; ++i) {
    const double* layer = table + i * rows * kColumns;
    value = folded(static_cast<Op>(static_cast<int32_t>(layer[0])), value, layer_value(layer, t));
  }
  return value;
}

}  // namespace nexus
