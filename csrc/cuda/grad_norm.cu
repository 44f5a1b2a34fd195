// The sum of squares of all gradients, for the global norm and for the check that they are finite.
//
// A chunk's sum goes to a place of its own, and the block that is done last adds those up. Every addition is
// in an order that depends on the chunks alone: not on the device, on which block comes first, or on
// alignment.
#include "kernels.h"
#include "launch.h"
#include "streams.h"

namespace nexus::cuda {
namespace {

// To thread 0.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, offset);
  }
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kThreads / 32; ++i) {
      sum += sums[i];
    }
  }
  __syncthreads();  // before `sums` is written again
  return sum;
}

// Sums of squares, by one thread.
struct Float64 {
  double sum = 0.0;

  template <class G>
  __device__ void add(const G& stored) {
    const auto x = static_cast<double>(decoded(stored));
    sum += x * x;
  }

  __device__ double total() const { return sum; }
};

// The same in two floats: most GPUs have few units for float64, and a thread then needs them once. Sum and
// square are exact in high + low, but for what low loses: of n squares, less than n^2 2^-48 of the sum.
struct TwoFloats {
  float high = 0.0f;
  float low = 0.0f;
  float largest = 0.0f;

  template <class G>
  __device__ void add(const G& stored) {
    const float x = decoded(stored);
    const float square = x * x;
    const float sum = high + square;
    const float added = sum - high;
    low += (high - (sum - added)) + (square - added);
    if constexpr (sizeof(G) == sizeof(float)) {  // of fewer bits, a square is exact
      low += fmaf(x, x, -square);
    }
    high = sum;
    largest = fmaxf(largest, fabsf(x));
  }

  // Whether no square was too large for a float, and none that counts too small.
  __device__ bool holds() const {
    return high - high + low == low && (largest == 0.0f || largest > 0x1p-45f);
  }
  __device__ double total() const { return static_cast<double>(high) + static_cast<double>(low); }
};

template <bool kAligned, int kCount, class G>
__device__ Pack<G, kCount> turn_at(const G* stream) {
  if constexpr (kAligned) {
    return fetch<kCount>(stream);
  } else {
    Pack<G, kCount> pack;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      pack.elements[k] = stream[k];
    }
    return pack;
  }
}

// Adds the elements of a chunk that are this thread's: the same in the same order, however they are aligned.
template <class Sum, bool kAligned, class G>
__device__ Sum summed(const G* grad, int32_t count) {
  constexpr int kCount = 16 / sizeof(G);  // of a turn
  constexpr int kTurns = 4;               // whose loads are on the way at once
  constexpr int32_t kStride = kThreads * kCount;
  const int32_t whole = count / kCount * kCount;
  Sum sum;
#pragma unroll 1
  for (int32_t i = static_cast<int32_t>(threadIdx.x) * kCount; i < whole; i += kTurns * kStride) {
    Pack<G, kCount> turns[kTurns];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int32_t at = i + turn * kStride;
      turns[turn] = turn_at<kAligned, kCount>(grad + (at < whole ? at : i));
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (i + turn * kStride < whole) {
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          sum.add(turns[turn].elements[k]);
        }
      }
    }
  }
  if (threadIdx.x == static_cast<unsigned>(whole / kCount % kThreads)) {  // the turn that is not whole
    for (int32_t k = whole; k < count; ++k) {
      sum.add(grad[k]);
    }
  }
  return sum;
}

template <class Sum, class G>
__device__ Sum summed(const G* grad, int32_t count) {
  return is_aligned<16 / sizeof(G)>(grad) ? summed<Sum, true>(grad, count) : summed<Sum, false>(grad, count);
}

template <class G>
__device__ double thread_sum(const G* grad, int32_t count) {
  if constexpr (sizeof(G) < sizeof(double)) {
    const auto sum = summed<TwoFloats>(grad, count);
    if (sum.holds()) {
      return sum.total();
    }
  }
  return summed<Float64>(grad, count).total();
}

__global__ void __launch_bounds__(kThreads, 4) sum_squares(Table table, double* out) {
  double sum = 0.0;
  if (blockIdx.x < table.chunk_count) {
    const Chunk chunk = table.chunks[blockIdx.x];
    const void* grad = pointers_of(table, chunk.tensor).grad;
    if (grad != nullptr) {
      sum = with_codec(table.tensors[chunk.tensor].grad_dtype, [&](auto codec) {
        return thread_sum(static_cast<const decltype(codec)*>(global(grad)) + chunk.begin, chunk.count);
      });
    }
  }
  sum = block_sum(sum);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    table.partial_sums[blockIdx.x] = sum;
    __threadfence();  // the sum is there before it is counted
    is_last = atomicAdd(&table.header->finished_sums, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) {
    return;
  }
  __threadfence();  // what the others have counted is there to be read
  double total = 0.0;
#pragma unroll 8
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    total += __ldcg(&table.partial_sums[i]);  // from where the other blocks' stores went
  }
  total = block_sum(total);
  if (threadIdx.x == 0) {
    *out = total;
    table.header->finished_sums = 0;
  }
}

}  // namespace

cudaError_t load_norm() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, sum_squares);
}

void sum_of_squares(const Table& table, double* out, cudaStream_t stream) {
  launch("the gradient norm", sum_squares, table.chunk_count, stream, table, out);
}

}  // namespace nexus::cuda
