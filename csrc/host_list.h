// The tensors of an optimizer and its hyperparameters, as the host sees them: what a watch keeps up to date
// and every step reads.
#pragma once

#include <utility>
#include <vector>

#include "hyperparameters.h"

namespace nexus {

struct HostList {
  std::vector<TensorRecord> tensors;  // device by device
  std::vector<Group> groups;          // every group once for each device, device by device

  // Two tensors with a gradient whose parameters share memory, or {-1, -1}. Threads would race on them.
  std::pair<int64_t, int64_t> overlap() const;
};

}  // namespace nexus
