// A stand-in for CUDA's header of this name: g++ compiles a .cu file as C++, and its kernels run on the CPU.
//
// A launch runs at once, in the calling thread: block after block, a block's threads as fibers that switch at
// barriers. While its stream is captured it is kept instead, and runs at each replay. What a kernel does
// wrong stops it, as on a device, and the launch returns the error; nexus_shim_fault() tells more:
//   - cudaErrorMisalignedAddress: an access that is not aligned to its type, which includes one of 16 bytes
//     through a pointer that is no multiple of 16. So vector accesses are to be written as accesses to types
//     of this alignment: a memcpy goes unnoticed.
//   - cudaErrorIllegalAddress: a null pointer, an index outside an array of known size, or an address where
//     nothing is, such as beyond the end of what nexus_shim_allocate() gave, in what nexus_shim_free() took
//     back, or on another device. (Memory of the host is not told from a device's: tests pass tensors of the
//     CPU.)
//   - cudaErrorLaunchTimeout: a barrier or a shuffle for which threads wait that others never reach, or have
//     left without. Stricter than a device, where threads that have returned count as arrived.
//   - cudaErrorLaunchFailure: signed overflow.
// Shared memory holds 0xCC at the start of each block, new memory of a device too, automatic variables a
// pattern. The host cannot touch a device's memory: that is a segmentation fault, as it would be.
//
// What .cu files must respect: `__shared__` before the type (alignas before `__shared__`), of fixed size (no
// extern arrays); grids and blocks of one dimension; launches by cudaLaunchKernelEx, kernels and launch code
// in one file; no block waits for a later one. Nothing that the kernels of nexus do not use is here: add it
// when they do.
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
#define __grid_constant__
#define __launch_bounds__(...)
#define __builtin_assume(condition) static_cast<void>(condition)
// Blocks run one after another, so that one copy serves them all. Thread-local, because the linker puts such
// variables of all .cu files side by side, where fibers.cpp finds them and fills them anew for each block.
#define __shared__ static __thread

struct dim3 {
  unsigned x;
  constexpr dim3(unsigned x = 1) : x(x) {}
};

#define NEXUS_SHIM_ERRORS(ERROR)                \
  ERROR(cudaSuccess, 0)                         \
  ERROR(cudaErrorInvalidValue, 1)               \
  ERROR(cudaErrorMemoryAllocation, 2)           \
  ERROR(cudaErrorInvalidConfiguration, 9)       \
  ERROR(cudaErrorInvalidDevice, 101)            \
  ERROR(cudaErrorInvalidResourceHandle, 400)    \
  ERROR(cudaErrorIllegalAddress, 700)           \
  ERROR(cudaErrorLaunchTimeout, 702)            \
  ERROR(cudaErrorMisalignedAddress, 716)        \
  ERROR(cudaErrorLaunchFailure, 719)            \
  ERROR(cudaErrorNotPermitted, 800)             \
  ERROR(cudaErrorStreamCaptureUnsupported, 900) \
  ERROR(cudaErrorStreamCaptureInvalidated, 901)

enum cudaError_t {
#define NEXUS_SHIM_ENUMERATOR(name, value) name = value,
  NEXUS_SHIM_ERRORS(NEXUS_SHIM_ENUMERATOR)
#undef NEXUS_SHIM_ENUMERATOR
};

enum cudaStreamCaptureStatus {
  cudaStreamCaptureStatusNone = 0,
  cudaStreamCaptureStatusActive = 1,
  cudaStreamCaptureStatusInvalidated = 2,
};

enum cudaStreamCaptureMode {
  cudaStreamCaptureModeGlobal = 0,
  cudaStreamCaptureModeRelaxed = 2,
};

struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUuserObject_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
using cudaGraph_t = CUgraph_st*;
using cudaUserObject_t = CUuserObject_st*;
using cudaHostFn_t = void (*)(void*);
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr unsigned cudaEventDisableTiming = 2;
constexpr unsigned cudaUserObjectNoDestructorSync = 1;
constexpr unsigned cudaGraphUserObjectMove = 1;

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  cudaStream_t stream;
};

struct cudaFuncAttributes {
  int maxThreadsPerBlock;
};

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags);
cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count);
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function);

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

// Waits until each thread of the block is here.
void wait_for_block();
// Waits until each of a warp's 32 lanes is here, and returns the bits that the lane `source` came with.
uint64_t wait_for_warp(uint64_t bits, unsigned source);
unsigned lane();

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

extern dim3 threadIdx;
extern dim3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;

inline void __syncthreads() { nexus_shim::wait_for_block(); }

namespace nexus_shim {

// What the lane `source` came with; beyond the warp's end, one's own.
template <class T>
T shuffled(T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "as CUDA's shuffles");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = wait_for_warp(bits, source < 32 ? source : lane());
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace nexus_shim

// Of whole warps: `mask` is not looked at.
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  return nexus_shim::shuffled(value, nexus_shim::lane() + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return nexus_shim::shuffled(value, nexus_shim::lane() ^ static_cast<unsigned>(lanes));
}

// One thread runs at a time.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return std::exchange(*address, *address + value);
}

inline bool __isGlobal(const void*) { return true; }

// A load with a hint for the caches.
template <class T>
T __ldcg(const T* address) {
  return *address;
}
