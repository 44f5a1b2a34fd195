// The row that each step leaves in the ring of a History. Host and device; no torch.
#pragma once

#include "record.h"

namespace nexus {

constexpr int64_t kHistoryColumns = 3;  // of the step; those of the groups follow, two each

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
