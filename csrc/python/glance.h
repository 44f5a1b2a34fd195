// Whether all that a captured step depends on is as it was after the last replay: cheaper than what a step
// asks, which follows what has moved.
#pragma once

#include <vector>

#include "watch.h"

namespace nexus {

class Glance {
 public:
  explicit Glance(const WatchedRecords& watch) : watch_(watch) {}

  // Takes parameters, gradients and settings as they are now. `attributes`: the optimizer's __dict__.
  void remember(const py::dict& attributes);

  // Whether there are the same groups with the same settings, every parameter is where it was, and has the
  // very gradient that it had. False before remember(), and where a part of it could not be read then.
  bool same(const py::dict& attributes) const;

 private:
  struct Seen {
    void* data;
    Object grad;  // held, so that no other has its address
  };

  bool look(const WatchedRecords::Parameter& parameter, void*& data, Object& grad) const;

  const WatchedRecords& watch_;
  bool is_remembered_ = false;
  uint64_t generation_ = 0;  // of the watch
  std::vector<Seen> parameters_;
  std::vector<std::vector<Object>> settings_;  // of each group
  Object seen_write_;
};

}  // namespace nexus
