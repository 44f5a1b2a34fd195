// What the kernels of the update share: a block's chunk, and how its threads take turns.
#pragma once

#include "streams.h"
#include "table.h"

namespace nexus::cuda {

// Whether this block updates anything. The one launch that `advances` moves the counters, too.
__device__ inline bool has_work(const Table& table, const StepState& state, bool advances) {
  const bool skip = table.header->skip != 0;
  if (advances && blockIdx.x == 0 && threadIdx.x == 0) {
    ++*(skip ? state.skipped : state.completed);
    advance(state.history);
  }
  return !skip && blockIdx.x < table.chunk_count;
}

// What this block updates, unless the gradient is null.
struct Work {
  Chunk chunk;
  const TensorRecord& record;
  TensorPointers pointers;

  __device__ explicit Work(const Table& table)
      : chunk(table.chunks[blockIdx.x]),
        record(table.tensors[chunk.tensor]),
        pointers(pointers_of(table, chunk.tensor)) {}
};

// Counts the update of a tensor, by the block that has its first chunk.
__device__ inline void count_update(const Work& work) {
  if (work.chunk.begin == 0 && threadIdx.x == 0) {
    *global(work.record.step) += 1.0;
  }
}

// Elements [begin, end) of a chunk. A thread takes kTurns turns at a time, each of Elements::kCount adjacent
// elements, and adjacent lanes take adjacent turns: an access of a warp covers whole sectors, whatever the
// codec. The loads of all these turns stand before the first store, which none of them has to wait for.
template <int kTurns, class Elements, class Streams, class T>
__device__ void update_range(const Streams& s, int32_t begin, int32_t end, const Coefficients<T>& c) {
  constexpr int kCount = Elements::kCount;
  constexpr int32_t kStride = kThreads * kCount;  // from one turn to the next
#pragma unroll 1
  for (int32_t i = begin + static_cast<int32_t>(threadIdx.x) * kCount; i < end; i += kTurns * kStride) {
    Elements turns[kTurns];
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      // A turn behind the end loads what the first does, so that no load waits for a branch.
      turns[k].fetch(s, i + k * kStride < end ? i + k * kStride : i);
    }
#pragma unroll
    for (int k = 0; k < kTurns; ++k) {
      if (i + k * kStride < end) {
        turns[k].update(s, i + k * kStride, c);
        turns[k].put(s, i + k * kStride);
      }
    }
  }
}

}  // namespace nexus::cuda
