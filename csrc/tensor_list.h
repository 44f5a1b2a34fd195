// Plain records: a tensor's pointers and size, and a chunk of one. Fixed layout, so that a device can read
// them.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace nexus {

enum class DType : int32_t { kOther = -1, kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

NEXUS_FN constexpr uint64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Every stream of one parameter, in the same element order. The moments have the type of the arithmetic:
// float64 for float64 parameters, float32 otherwise.
struct TensorRecord {
  void* param;
  const void* grad;  // null: no gradient in this step, so nothing of this tensor changes
  void* exp_avg;
  void* exp_avg_sq;
  void* max_exp_avg_sq;  // null without amsgrad
  double* step;          // the parameter's own count of updates, a whole number up to 2^53
  int64_t numel;
  int32_t group;
  DType param_dtype;
  DType grad_dtype;
  int32_t first_chunk;  // of this tensor, among those of its device
};
static_assert(sizeof(TensorRecord) == 72, "the layout is part of the interface with the devices");

// Elements [begin, begin + count) of one tensor.
struct Chunk {
  int64_t begin;
  int32_t count;
  int32_t tensor;
};
static_assert(sizeof(Chunk) == 16, "the layout is part of the interface with the devices");

constexpr int64_t kChunkElements = 16384;

NEXUS_FN constexpr int64_t chunk_count(int64_t numel) {
  return (numel + kChunkElements - 1) / kChunkElements;
}

// Chunk `index` of a tensor of `numel` elements. All of it in int64: numel may exceed 2^31.
NEXUS_FN constexpr Chunk chunk_at(int64_t numel, int64_t index, int32_t tensor) {
  const int64_t begin = index * kChunkElements;
  const int64_t left = numel - begin;
  return {begin, static_cast<int32_t>(left < kChunkElements ? left : kChunkElements), tensor};
}

}  // namespace nexus
