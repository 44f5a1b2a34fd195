// The C++ formula of every curve, and the look-up of the segment in force at a step.
//
// A schedule reaches the kernels as a table of float64 rows (curve, start, length, high, low), the first of
// which starts at step 0. The segment in force at step t is the last one whose start is <= t, and it repeats,
// with period `length`, until the next one begins: one row is a whole train of cosine restarts. Its value is
//
//     low + weight(position / length) * (high - low),    position = (t - start) mod length
//
// in the very order of operations of the Python oracle (nexus/schedules), so that both agree bit for bit.
// Steps are exact integers up to 2^53 and never pass through float32. Host and device; no torch.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace nexus {

enum class Curve : int32_t { kConstant = 0, kRise = 1, kLinear = 2, kCosine = 3, kSqrt = 4 };

constexpr int64_t kSegmentColumns = 5;

NEXUS_FN double curve_weight(Curve curve, double p) {
  constexpr double kHalfPi = 1.57079632679489661923;
  switch (curve) {
    case Curve::kConstant:
      return 1.0;
    case Curve::kRise:
      return p;
    case Curve::kLinear:
      return 1.0 - p;
    case Curve::kCosine:
      return cos(kHalfPi * p) * cos(kHalfPi * p);
    case Curve::kSqrt:
      return 1.0 - sqrt(p);
  }
  return NAN;  // no curve: a table is refused before it gets here
}

// The schedule's value at step t >= 0. `table` holds `rows` rows of kSegmentColumns, starts in ascending
// order.
NEXUS_FN double evaluate_schedule(const double* table, int64_t rows, int64_t t) {
  int64_t first = 0;
  int64_t last = rows;  // the segment sought is in [first, last)
  while (last - first > 1) {
    const int64_t middle = first + (last - first) / 2;
    if (static_cast<int64_t>(table[middle * kSegmentColumns + 1]) <= t) {
      first = middle;
    } else {
      last = middle;
    }
  }
  const double* row = table + first * kSegmentColumns;
  const int64_t length = static_cast<int64_t>(row[2]);
  const int64_t position = (t - static_cast<int64_t>(row[1])) % length;
  const double p = static_cast<double>(position) / static_cast<double>(length);
  const double high = row[3];
  const double low = row[4];
  return low + curve_weight(static_cast<Curve>(static_cast<int32_t>(row[0])), p) * (high - low);
}

}  // namespace nexus
