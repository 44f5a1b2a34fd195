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

template <class G>
__device__ double square(const G& stored) {
  double x;
  load(&stored, &x, 1);
  return x * x;
}

template <class G>
__device__ double thread_sum(const G* grad, int32_t count) {
  constexpr int kElements = 16 / sizeof(G);
  const bool aligned = is_aligned<kElements>(grad);
  double sum = 0.0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x) * kElements; i < count; i += kThreads * kElements) {
    if (aligned && i + kElements <= count) {
      const Pack<G, kElements> pack = fetch<kElements>(grad + i);
#pragma unroll
      for (int k = 0; k < kElements; ++k) {
        sum += square(pack.elements[k]);
      }
    } else {
      for (int32_t k = i; k < i + kElements && k < count; ++k) {
        sum += square(grad[k]);
      }
    }
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads) sum_squares(Table table, double* out) {
  double sum = 0.0;
  if (blockIdx.x < table.chunk_count) {
    const Chunk chunk = table.chunks[blockIdx.x];
    const void* grad = table.pointers[chunk.tensor].grad;
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
