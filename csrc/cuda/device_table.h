// A Table in device memory, and the host's copy of what it holds.
#pragma once

#include <cuda_runtime.h>

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

// Lets this thread allocate, free and wait while a stream is being captured. What it does so is no part of
// the graph.
class OutsideCapture {
 public:
  OutsideCapture();
  ~OutsideCapture();
  OutsideCapture(const OutsideCapture&) = delete;
  OutsideCapture& operator=(const OutsideCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// What a step on one device reads.
struct Contents {
  std::vector<TensorRecord> tensors;  // param and grad stand in `pointers`, and are null here
  std::vector<TensorPointers> pointers;
  std::vector<Group> groups;
  int64_t chunk_count = 0;
  bool measures_norm = false;
  CodecPairs codecs;
};

class DeviceTable {
 public:
  explicit DeviceTable(int device) : device_(device) {}
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  int device() const { return device_; }

  // To be called when other `tensors` follow: the next write() is of everything.
  void forget() { complete_ = false; }

  // Enqueues what brings the device up to date: all of it at first, then the pointers and groups that
  // changed. If that fails, everything is written the next time.
  void write(const Contents& now, cudaStream_t stream);

  // Enqueues the hyperparameters alone, into a table of as many groups; another one stays as it is. Throws
  // where they need the norm, and the step that has this table does not measure it.
  void write_groups(const Contents& now, cudaStream_t stream);

  bool holds(const Contents& now) const;

  const Table& get() const { return table_; }

 private:
  void lay_out(const Contents& now);

  int device_;
  void* memory_ = nullptr;
  size_t capacity_ = 0;
  Table table_ = {};
  bool complete_ = false;
  Contents written_;
};

}  // namespace nexus::cuda
