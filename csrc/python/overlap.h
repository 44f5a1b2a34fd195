// Parameters that share memory, on which threads would race.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "../record.h"

namespace nexus {

// Two tensors with a gradient whose parameters share memory, or {-1, -1}.
inline std::pair<int64_t, int64_t> overlap(const std::vector<TensorRecord>& tensors) {
  struct Range {
    uintptr_t begin, end;
    int64_t tensor;
  };
  std::vector<Range> ranges;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(tensors[i].param);
    const auto bytes = static_cast<uintptr_t>(tensors[i].numel) * item_size(tensors[i].param_dtype);
    if (bytes > 0 && tensors[i].grad != nullptr) {
      ranges.push_back({begin, begin + bytes, static_cast<int64_t>(i)});
    }
  }
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].begin < ranges[i - 1].end) {
      return {ranges[i - 1].tensor, ranges[i].tensor};
    }
  }
  return {-1, -1};
}

}  // namespace nexus
