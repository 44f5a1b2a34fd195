// Small kernels, right and wrong ones, which test the shim itself. C functions, for ctypes.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;

__device__ double block_sum(double value) {
  __shared__ double partial[kThreads / 32];
  for (int delta = 16; delta > 0; delta /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, delta);
  }
  if (threadIdx.x % 32 == 0) {
    partial[threadIdx.x / 32] = value;
  }
  __syncthreads();
  double sum = 0;
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    sum += partial[warp];
  }
  __syncthreads();
  return sum;
}

// The last block to finish adds the blocks' sums.
__global__ void __launch_bounds__(kThreads) sum_kernel(const float* __restrict__ values, int64_t count,
                                                       double* sums, unsigned* finished, double* out) {
  double value = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    value += __ldg(values + i);
  }
  const double sum = block_sum(value);
  __shared__ bool last;
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) {
    return;
  }
  value = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads) {
    value += __ldcg(sums + i);
  }
  value = block_sum(value);
  if (threadIdx.x == 0) {
    *out = value;
    *finished = 0;
  }
}

// Each thread notes which one of the whole grid it is, and when it ran.
__global__ void order_kernel(int* when, int* clock) {
  when[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(clock, 1);
}

// Without the barrier, or with it in the wrong place, threads read what others have not written yet.
template <bool kBarrier>
__global__ void reverse_kernel(const int* in, int* out) {
  __shared__ int staged[kThreads];
  staged[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) {
    __syncthreads();
  }
  out[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

__global__ void barriers_kernel(int count) {
  for (int i = 0; i < count; ++i) {
    __syncthreads();
  }
}

__global__ void votes_kernel(const int* predicates, int* any, int* all) {
  any[threadIdx.x] = __syncthreads_or(predicates[threadIdx.x]);
  all[threadIdx.x] = __syncthreads_and(predicates[threadIdx.x]);
}

enum class Wrong { kSkipsBarrier, kReturnsEarly, kMixesBarriers, kSkipsShuffle, kForeignMask, kOverflows };

__global__ void wrong_kernel(Wrong what, int* sink) {
  const bool odd_one = threadIdx.x == 5;
  __shared__ int few[4];
  switch (what) {
    case Wrong::kSkipsBarrier:
      if (!odd_one) {
        __syncthreads();
      }
      break;
    case Wrong::kReturnsEarly:
      if (odd_one) {
        return;
      }
      __syncthreads();
      break;
    case Wrong::kMixesBarriers:
      if (odd_one) {
        __syncthreads();
      } else {
        __syncthreads_or(1);
      }
      break;
    case Wrong::kSkipsShuffle:
      if (!odd_one) {
        *sink = __shfl_xor_sync(0xffffffffu, 1, 1);
      }
      break;
    case Wrong::kForeignMask:
      *sink = __shfl_sync(1u, 1, 0);
      break;
    case Wrong::kOverflows:
      *sink += INT32_MAX;
      *sink += INT32_MAX;
      break;
  }
  __syncthreads();
  few[threadIdx.x % 4] = 0;
}

template <class Vector>
__global__ void copy_kernel(const Vector* in, Vector* out) {
  *out = *in;
}

__global__ void index_kernel(int index, int* out) {
  __shared__ int few[4];
  few[index] = 1;
  *out = few[index];
}

// Reads shared and local memory that nobody has written, and writes it for the next block to find.
__global__ void uninitialised_kernel(unsigned* shared, unsigned* local, unsigned* idle_lane) {
  __shared__ unsigned word;
  unsigned never_set;
  shared[blockIdx.x] = word;
  word = 1;
  asm volatile("" : "=m"(never_set));
  local[blockIdx.x] = never_set;
  idle_lane[blockIdx.x] = __shfl_sync(1u, 7u, 3);
}

__global__ void add_kernel(int* values, int count, int amount) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    values[i] += amount;
  }
}

cudaLaunchConfig_t grid(unsigned blocks, unsigned threads, void* stream = nullptr) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(stream);
  return config;
}

template <class... Parameters, class... Arguments>
int launch(const cudaLaunchConfig_t& config, void (*kernel)(Parameters...), Arguments... arguments) {
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

#define TOY extern "C" __attribute__((visibility("default")))

TOY int toy_sum(const float* values, int64_t count, int blocks, double* sums, unsigned* finished, double* out,
                void* stream) {
  return launch(grid(blocks, kThreads, stream), sum_kernel, values, count, sums, finished, out);
}
TOY int toy_order(int blocks, int threads, int* when, int* clock) {
  return launch(grid(blocks, threads), order_kernel, when, clock);
}
TOY int toy_reverse(bool barrier, const int* in, int* out) {
  return launch(grid(1, kThreads), barrier ? reverse_kernel<true> : reverse_kernel<false>, in, out);
}
TOY int toy_barriers(int count) { return launch(grid(1, kThreads), barriers_kernel, count); }
TOY int toy_votes(int threads, const int* predicates, int* any, int* all) {
  return launch(grid(1, threads), votes_kernel, predicates, any, all);
}
TOY int toy_wrong(int what, int* sink) {
  return launch(grid(2, kThreads), wrong_kernel, static_cast<Wrong>(what), sink);
}
TOY int toy_copy_float4(const float4* in, float4* out) {
  return launch(grid(1, 1), copy_kernel<float4>, in, out);
}
TOY int toy_copy_double(const double* in, double* out) {
  return launch(grid(1, 1), copy_kernel<double>, in, out);
}
TOY int toy_index(int index, int* out) { return launch(grid(1, 1), index_kernel, index, out); }
TOY int toy_uninitialised(unsigned* shared, unsigned* local, unsigned* idle_lane) {
  return launch(grid(2, 1), uninitialised_kernel, shared, local, idle_lane);
}
TOY const char* toy_last_error() { return cudaGetErrorName(cudaGetLastError()); }
TOY int toy_multiprocessors() {
  int count = 0;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0);
  return count;
}
TOY int toy_is_capturing(void* stream) {
  cudaStreamCaptureStatus status;
  cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  return status;
}
TOY int toy_add(int* values, int count, int amount, void* stream) {
  return launch(grid(1, kThreads, stream), add_kernel, values, count, amount);
}
TOY int toy_set_device(int device) { return cudaSetDevice(device); }
TOY void* toy_malloc(size_t bytes) {
  int* address = nullptr;
  cudaMalloc(&address, bytes);
  return address;
}
TOY int toy_free(void* address) { return cudaFree(address); }
TOY int toy_copy(void* to, const void* from, size_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream));
}
TOY int toy_set(void* to, int value, size_t bytes, void* stream) {
  return cudaMemsetAsync(to, value, bytes, static_cast<cudaStream_t>(stream));
}
TOY int toy_synchronize(void* stream) { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }
TOY void* toy_stream() {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}
TOY int toy_destroy(void* stream) { return cudaStreamDestroy(static_cast<cudaStream_t>(stream)); }
TOY int toy_exchange_capture_mode(int mode) {
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  cudaThreadExchangeStreamCaptureMode(&exchanged);
  return exchanged;
}
