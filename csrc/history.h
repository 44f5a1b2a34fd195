// A ring in device memory in which each step leaves a row: what a training curve is drawn from.
//
// A row is float64: t, skipped (0 or 1), gradient norm, then of each group lr and clip coefficient. Host and
// device; no torch.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nexus {

constexpr int64_t kHistoryColumns = 3;  // of the step; those of the groups follow, two each

struct History {
  int64_t* count;  // rows written so far; null: no history
  double* rows;    // slots x width: row i is in slot i % slots
  // One more than are read: a row that no step has completed is in the place of none that is read.
  int64_t slots;
  int64_t width;
};

// The row of the step that is under way. advance() completes it.
NEXUS_FN double* current_row(const History& history) {
  return history.rows + *history.count % history.slots * history.width;
}

NEXUS_FN void record_step(const History& history, int64_t t, bool skipped, double grad_norm) {
  if (history.count != nullptr) {
    double* row = current_row(history);
    row[0] = static_cast<double>(t);
    row[1] = skipped ? 1.0 : 0.0;
    row[2] = grad_norm;
  }
}

NEXUS_FN void record_group(const History& history, int64_t group, double lr, double clip) {
  if (history.count != nullptr) {
    double* columns = current_row(history) + kHistoryColumns + 2 * group;
    columns[0] = lr;
    columns[1] = clip;
  }
}

NEXUS_FN void advance(const History& history) {
  if (history.count != nullptr) {
    ++*history.count;
  }
}

}  // namespace nexus
