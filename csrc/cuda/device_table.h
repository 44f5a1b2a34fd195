// A Table in device memory, and the host's copy of what it holds.
#pragma once

#include <cuda_runtime.h>

#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "table.h"

namespace nexus::cuda {

// Makes a device current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;  // or -1: it was current already
};

// A block of device memory. Whoever lets go of it last may be a thread that must not call CUDA.
using Memory = std::shared_ptr<void>;

// Gives memory of a device. Once nobody holds it, it serves again what is enqueued on `stream` from then on.
// Throws where there is none.
using Allocate = std::function<Memory(int device, size_t bytes, cudaStream_t stream)>;

// What a step on one device reads.
struct Contents {
  std::vector<TensorRecord> tensors;  // param and grad stand in `pointers`, and are null here
  std::vector<TensorPointers> pointers;
  std::vector<Group> groups;
  int64_t chunk_count = 0;
  bool measures_norm = false;
  Kinds kinds;
  bool keeps_products = false;
};

class DeviceTable {
 public:
  // `allocate` outlives the table.
  DeviceTable(int device, const Allocate& allocate) : device_(device), allocate_(allocate) {}

  int device() const { return device_; }

  // To be called when other `tensors` follow: the next write() is of everything.
  void forget() { complete_ = false; }

  // Enqueues what brings the device up to date: all of it at first, and on another stream, then the pointers
  // and groups that changed. If that fails, everything is written the next time.
  void write(const Contents& now, cudaStream_t stream);

  // Enqueues the hyperparameters alone, into a table of as many groups; another one stays as it is. Throws
  // where they need the norm, and the step that has this table does not measure it.
  void write_groups(const Contents& now, cudaStream_t stream);

  bool holds(const Contents& now) const;

  const Table& get() const { return table_; }

  // Hands the memory over. The table is there as long as others hold that.
  Memory take_memory() { return std::move(memory_); }

 private:
  void lay_out(const Contents& now, cudaStream_t stream);

  int device_;
  const Allocate& allocate_;
  Memory memory_;
  size_t capacity_ = 0;
  cudaStream_t stream_ = nullptr;  // for whose work the memory was allocated
  Table table_ = {};
  bool complete_ = false;
  Contents written_;
};

}  // namespace nexus::cuda
