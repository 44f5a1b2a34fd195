// A stand-in for CUDA's header of this name: g++ compiles a .cu file as C++, and its kernels run on the CPU.
//
// A launch runs at once, in the calling thread: block after block, a block's threads as fibers that switch at
// barriers. While its stream is captured it is kept instead, and runs at each replay. What a kernel does
// wrong stops it, as on a device, and the launch returns the error; nexus_shim_fault() tells more:
//   - cudaErrorMisalignedAddress: an access that is not aligned to its type, which includes a float4 or a
//     uint4 through a pointer that is no multiple of 16. So vector accesses are to be written as accesses to
//     those types: a memcpy goes unnoticed.
//   - cudaErrorIllegalAddress: a null pointer, an index outside an array of known size, or an address where
//     nothing is, such as beyond the end of what cudaMalloc() gave, in what cudaFree() took back, or on
//     another device. (Memory of the host is not told from a device's: tests pass tensors of the CPU.)
//   - cudaErrorLaunchTimeout: a barrier or a shuffle for which threads wait that others never reach, or have
//     left without; also threads at different kinds of barriers. Stricter than a device, where threads that
//     have returned count as arrived.
//   - cudaErrorLaunchFailure: signed overflow.
// Shared memory holds 0xCC at the start of each block, new memory of a device too, automatic variables a
// pattern, and so does what a shuffle reads from a lane that takes no part. The host cannot touch what
// cudaMalloc() gave: that is a segmentation fault, as it would be.
//
// What .cu files must respect: `__shared__` before the type (alignas before `__shared__`), of fixed size (no
// extern arrays); launches by cudaLaunchKernelEx, kernels and launch code in one file; no block waits for a
// later one. Nothing that the kernels of nexus do not use is here: add it when they do.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__  // empty: the standard library's headers use the word in attributes
#define __forceinline__ inline __attribute__((always_inline))
#define __builtin_assume(condition) static_cast<void>(condition)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after another, so that one copy serves them all. Thread-local, because the linker puts such
// variables of all .cu files side by side, where fibers.cpp finds them and fills them anew for each block.
#define __shared__ static __thread

// Vectors, aligned as on the device.
#define NEXUS_SHIM_VECTOR2(type, name)      \
  struct __align__(2 * sizeof(type)) name { \
    type x, y;                              \
  };                                        \
  inline name make_##name(type x, type y) { return {x, y}; }
#define NEXUS_SHIM_VECTOR4(type, name) \
  struct __align__(16) name {          \
    type x, y, z, w;                   \
  };                                   \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
NEXUS_SHIM_VECTOR2(int, int2)
NEXUS_SHIM_VECTOR2(unsigned, uint2)
NEXUS_SHIM_VECTOR2(float, float2)
NEXUS_SHIM_VECTOR2(double, double2)
NEXUS_SHIM_VECTOR2(long long, longlong2)
NEXUS_SHIM_VECTOR4(int, int4)
NEXUS_SHIM_VECTOR4(unsigned, uint4)
NEXUS_SHIM_VECTOR4(float, float4)
#undef NEXUS_SHIM_VECTOR2
#undef NEXUS_SHIM_VECTOR4

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInitializationError = 3,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorUnknown = 999,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeThreadLocal = 1,
  cudaStreamCaptureModeRelaxed = 2,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
constexpr unsigned cudaStreamDefault = 0;
constexpr unsigned cudaStreamNonBlocking = 1;

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
union cudaLaunchAttributeValue {
  char pad[64];
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
  size_t constSizeBytes;
  size_t localSizeBytes;
  int maxThreadsPerBlock;
  int numRegs;
  int ptxVersion;
  int binaryVersion;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** address, size_t bytes);
cudaError_t cudaFree(void* address);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream = nullptr);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id = nullptr);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaRuntimeGetVersion(int* version);

template <class T>
cudaError_t cudaMalloc(T** address, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(address), bytes);
}

template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T* function) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(function));
}

namespace nexus_shim {

// A kernel with the arguments of one launch; run() is what one thread does.
struct Call {
  virtual ~Call() = default;
  virtual void run() = 0;
};

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::shared_ptr<Call> call);

enum class Barrier : int { kNone, kBlock, kBlockOr, kBlockAnd, kWarp, kShuffle };

// Waits until each thread of the block is here, and returns how many came with `predicate`.
int wait_for_block(Barrier kind, bool predicate);
// Waits until each lane of `mask` is here, and returns the bits that lane `source` came with.
uint64_t wait_for_warp(Barrier kind, unsigned mask, uint64_t bits, int source);
int lane();

template <class T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "as CUDA's shuffles");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = wait_for_warp(Barrier::kShuffle, mask, bits, source);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace nexus_shim

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what every CUDA version takes");
  struct KernelCall final : nexus_shim::Call {
    KernelCall(void (*kernel)(Parameters...), Parameters... parameters)
        : kernel(kernel), parameters(parameters...) {}
    void run() override { std::apply(kernel, parameters); }
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  return nexus_shim::launch(*config, reinterpret_cast<const void*>(kernel),
                            std::make_shared<KernelCall>(kernel, std::forward<Arguments>(arguments)...));
}

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;

inline void __syncthreads() { nexus_shim::wait_for_block(nexus_shim::Barrier::kBlock, false); }
inline int __syncthreads_or(int predicate) {
  return nexus_shim::wait_for_block(nexus_shim::Barrier::kBlockOr, predicate != 0) != 0;
}
inline int __syncthreads_and(int predicate) {
  return nexus_shim::wait_for_block(nexus_shim::Barrier::kBlockAnd, predicate == 0) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  nexus_shim::wait_for_warp(nexus_shim::Barrier::kWarp, mask, 0, nexus_shim::lane());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return nexus_shim::shuffle(mask, value, source & 31);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned source = nexus_shim::lane() + delta;
  return nexus_shim::shuffle(mask, value, source < 32 ? source : nexus_shim::lane());
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return nexus_shim::shuffle(mask, value, (nexus_shim::lane() ^ lane_mask) & 31);
}

// One thread runs at a time.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int atomicAdd(int* address, int value) { return std::exchange(*address, *address + value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return std::exchange(*address, *address + value);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return std::exchange(*address, *address + value);
}
inline float atomicAdd(float* address, float value) { return std::exchange(*address, *address + value); }
inline double atomicAdd(double* address, double value) { return std::exchange(*address, *address + value); }

inline bool __isGlobal(const void*) { return true; }

// Loads and stores with a hint for the caches.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
