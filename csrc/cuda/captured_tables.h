// The tables of steps that graphs have captured.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "device_table.h"

namespace nexus::cuda {

// The graph that a stream is being captured into, or null.
cudaGraph_t graph_of(cudaStream_t stream);

// Lets this thread allocate and wait while a stream is being captured. What it does so is no part of the
// graph.
class OutsideCapture {
 public:
  OutsideCapture();
  ~OutsideCapture();
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// A graph holds the memory of the tables that it reads. The last one to hold it may be gone before this
// object, or after.
//
// That memory is not from the graph's own pool, whose blocks a replay writes to before it comes to the step.
// It is allocated for a stream of its own on each device, which nobody captures.
class CapturedTables {
 public:
  // `allocate` outlives this object.
  explicit CapturedTables(const Allocate& allocate) : allocate_(allocate) {}

  // A table of these contents for a step that `graph` captures: one that is there, or another, which is
  // complete on return. Nothing but write_groups() writes to it again.
  const Table& table(int device, const Contents& contents, cudaGraph_t graph);

  // DeviceTable::write_groups() of all of a device.
  void write_groups(int device, const Contents& contents, cudaStream_t stream);

  // Whether no graph is left.
  bool empty();

 private:
  struct Captured {
    std::unique_ptr<DeviceTable> table;
    std::weak_ptr<void> memory;
  };

  void forget_dropped();

  const Allocate& allocate_;
  std::vector<Captured> tables_;
};

}  // namespace nexus::cuda
