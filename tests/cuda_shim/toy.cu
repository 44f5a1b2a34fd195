// Small kernels, right and wrong ones, which test the shim itself. C functions, for ctypes.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;

// Each thread notes when it ran.
__global__ void order_kernel(int* when, unsigned* clock) {
  when[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<int>(atomicAdd(clock, 1u));
}

// Without the barrier, threads read what others have not written yet.
template <bool kBarrier>
__global__ void reverse_kernel(const int* in, int* out) {
  __shared__ int staged[kThreads];
  staged[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) {
    __syncthreads();
  }
  out[threadIdx.x] = staged[blockDim.x - 1 - threadIdx.x];
}

enum class Wrong { kSkipsBarrier, kReturnsEarly, kSkipsShuffle, kOverflows };

__global__ void wrong_kernel(Wrong what, int* sink) {
  const bool odd_one = threadIdx.x == 5;
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
    case Wrong::kSkipsShuffle:
      if (!odd_one) {
        *sink = __shfl_down_sync(0xffffffffu, 1, 1);
      }
      break;
    case Wrong::kOverflows:
      *sink += INT32_MAX;
      *sink += INT32_MAX;
      break;
  }
  __syncthreads();
}

template <class T>
__global__ void copy_kernel(const T* in, T* out) {
  *out = *in;
}

__global__ void index_kernel(int index, int* out) {
  __shared__ int few[4];
  few[index] = 1;
  *out = few[index];
}

// Reads shared and local memory that nobody has written, and writes it for the next block to find.
__global__ void uninitialised_kernel(unsigned* shared, unsigned* local) {
  __shared__ unsigned word;
  unsigned never_set;
  shared[blockIdx.x] = word;
  word = 1;
  asm volatile("" : "=m"(never_set));
  local[blockIdx.x] = never_set;
}

__global__ void add_kernel(const int* from, int* to, int count, int amount) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
    to[i] = from[i] + amount;
  }
}

template <class... Parameters, class... Arguments>
int launch_on(void* stream, unsigned blocks, unsigned threads, void (*kernel)(Parameters...),
              Arguments... arguments) {
  const cudaLaunchConfig_t config = {dim3(blocks), dim3(threads), static_cast<cudaStream_t>(stream)};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Lets the graph that a stream is captured into hold something.
int hold(void* stream, void* held, cudaHostFn_t let_go) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  cudaUserObject_t object = nullptr;
  cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, nullptr, &graph);
  cudaUserObjectCreate(&object, held, let_go, 1, cudaUserObjectNoDestructorSync);
  return cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
}

// As wide an access as there is.
struct alignas(16) Wide {
  float elements[4];
};

}  // namespace

#define TOY extern "C" __attribute__((visibility("default")))

TOY int toy_order(int blocks, int threads, int* when, unsigned* clock) {
  return launch_on(nullptr, blocks, threads, order_kernel, when, clock);
}
TOY int toy_reverse(bool barrier, const int* in, int* out) {
  return launch_on(nullptr, 1, kThreads, barrier ? reverse_kernel<true> : reverse_kernel<false>, in, out);
}
TOY int toy_wrong(int what, int* sink) {
  return launch_on(nullptr, 2, kThreads, wrong_kernel, static_cast<Wrong>(what), sink);
}
TOY int toy_copy_16(const Wide* in, Wide* out) {
  return launch_on(nullptr, 1, 1, copy_kernel<Wide>, in, out);
}
TOY int toy_copy_8(const double* in, double* out) {
  return launch_on(nullptr, 1, 1, copy_kernel<double>, in, out);
}
TOY int toy_index(int index, int* out) { return launch_on(nullptr, 1, 1, index_kernel, index, out); }
TOY int toy_uninitialised(unsigned* shared, unsigned* local) {
  return launch_on(nullptr, 2, 1, uninitialised_kernel, shared, local);
}
TOY int toy_add(const int* from, int* to, int count, int amount, void* stream) {
  return launch_on(stream, 1, kThreads, add_kernel, from, to, count, amount);
}
TOY const char* toy_last_error() { return cudaGetErrorName(cudaGetLastError()); }
TOY int toy_capture_status(void* stream) {
  cudaStreamCaptureStatus status;
  cudaGraph_t graph = nullptr;
  cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, nullptr, &graph);
  return status;
}
TOY int toy_set_device(int device) { return cudaSetDevice(device); }
TOY int toy_synchronize(void* stream) { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }
TOY void* toy_stream() {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  return stream;
}
// What holds `count` counts it down when it lets go.
TOY int toy_hold(void* stream, int* count) {
  return hold(stream, count, [](void* held) { --*static_cast<int*>(held); });
}
TOY int toy_hold_and_call(void* stream, int* error) {
  return hold(stream, error, [](void* held) { *static_cast<int*>(held) = cudaSetDevice(0); });
}
TOY int toy_exchange_capture_mode(int mode) {
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  cudaThreadExchangeStreamCaptureMode(&exchanged);
  return exchanged;
}
