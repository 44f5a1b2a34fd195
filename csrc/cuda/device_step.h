// A step on one CUDA device.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <vector>

#include "../hyperparameters.h"
#include "captured_tables.h"
#include "device_table.h"

namespace nexus::cuda {

// Where a device's tensors and groups stand in the records of all.
struct Part {
  int device;
  int64_t first_tensor, tensor_count;
  int64_t first_group, group_count;
};

// What a prologue has left for the update of one tensor; null: nothing.
struct Prepared {
  Header* header;
  CoefficientRow* coefficients;
};

// Everything here is enqueued on the caller's stream, and returns at once.
//
// While that stream is being captured, a step gets a table of CapturedTables: a graph that is replayed finds
// what the captured step has seen.
class DeviceStep {
 public:
  // `captured` outlives this object.
  DeviceStep(const Records& records, const Part& part, std::unique_ptr<DeviceTable> table,
             CapturedTables& captured);

  int device() const { return part_.device; }
  std::unique_ptr<DeviceTable> take_table() { return std::move(table_); }

  StepState state = {};
  Prepared given = {};  // by the prologue of another step: the next one does without its own

  // The sum of squares of this device's gradients.
  void sum_of_squares(double* out, cudaStream_t stream);

  // Evaluates the rates, for updates of each tensor by a step of its own, until the next step here. The
  // gradients need not be there yet.
  void prologue(cudaStream_t stream);

  // Of the last prologue(), for a step on a stream; nothing where that is another stream.
  Prepared prepared(size_t tensor, cudaStream_t stream) const;

  // Decides whether to skip, evaluates the rates, updates every tensor, and advances the counters.
  void step(cudaStream_t stream);

  // Gives the hyperparameters of this moment to the steps that were captured, too.
  void update_captured(cudaStream_t stream);

 private:
  void read_groups();
  const Table& current_table(cudaStream_t stream);

  const Records& records_;
  Part part_;
  Contents contents_;
  std::unique_ptr<DeviceTable> table_;
  CapturedTables& captured_;
  bool is_prepared_ = false;  // by prologue(), on the stream:
  cudaStream_t prepared_on_ = nullptr;
};

}  // namespace nexus::cuda
