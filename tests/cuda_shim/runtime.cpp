// Errors, devices and functions; and nexus_shim_*(), which controls.py calls.
#include "control.h"

namespace nexus_shim {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

thread_local int current_device = 0;

cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

cudaError_t called(const char* function) {
  ++control.calls[function];
  const auto failure = control.failures.find(function);
  if (failure == control.failures.end() || failure->second.calls_before-- > 0) {
    return cudaSuccess;
  }
  const cudaError_t error = failure->second.error;
  control.failures.erase(failure);
  return error;
}

}  // namespace nexus_shim

using namespace nexus_shim;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NEXUS_SHIM_CASE(name) \
  case name:                  \
    return #name;
    NEXUS_SHIM_CASE(cudaSuccess)
    NEXUS_SHIM_CASE(cudaErrorInvalidValue)
    NEXUS_SHIM_CASE(cudaErrorMemoryAllocation)
    NEXUS_SHIM_CASE(cudaErrorInitializationError)
    NEXUS_SHIM_CASE(cudaErrorInvalidConfiguration)
    NEXUS_SHIM_CASE(cudaErrorInsufficientDriver)
    NEXUS_SHIM_CASE(cudaErrorInvalidDeviceFunction)
    NEXUS_SHIM_CASE(cudaErrorNoDevice)
    NEXUS_SHIM_CASE(cudaErrorInvalidDevice)
    NEXUS_SHIM_CASE(cudaErrorNoKernelImageForDevice)
    NEXUS_SHIM_CASE(cudaErrorInvalidResourceHandle)
    NEXUS_SHIM_CASE(cudaErrorIllegalAddress)
    NEXUS_SHIM_CASE(cudaErrorLaunchOutOfResources)
    NEXUS_SHIM_CASE(cudaErrorLaunchTimeout)
    NEXUS_SHIM_CASE(cudaErrorMisalignedAddress)
    NEXUS_SHIM_CASE(cudaErrorLaunchFailure)
    NEXUS_SHIM_CASE(cudaErrorStreamCaptureUnsupported)
    NEXUS_SHIM_CASE(cudaErrorStreamCaptureInvalidated)
    NEXUS_SHIM_CASE(cudaErrorUnknown)
#undef NEXUS_SHIM_CASE
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = control.devices;
  const cudaError_t error = called(__func__);
  return remembered(error == cudaSuccess && control.devices == 0 ? cudaErrorNoDevice : error);
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return remembered(called(__func__));
}

cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = called(__func__); error != cudaSuccess) {
    return remembered(error);
  }
  if (device < 0 || device >= control.devices) {
    return remembered(cudaErrorInvalidDevice);
  }
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = called(__func__); error != cudaSuccess) {
    return remembered(error);
  }
  if (device < 0 || device >= control.devices) {
    return remembered(cudaErrorInvalidDevice);
  }
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = control.multiprocessors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = control.capability[0];
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = control.capability[1];
      break;
  }
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {0, 0, 0, kMaxThreads, 32, 90, 90};
  return remembered(called(__func__));
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return remembered(called(__func__));
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return remembered(called(__func__));
}

NEXUS_SHIM_CONTROL void nexus_shim_reset() {
  control = {};
  last_error = cudaSuccess;
  current_device = 0;
  forget_freed();
}

NEXUS_SHIM_CONTROL void nexus_shim_set_devices(int count, int multiprocessors, int major, int minor) {
  control.devices = count;
  control.multiprocessors = multiprocessors;
  control.capability[0] = major;
  control.capability[1] = minor;
}

NEXUS_SHIM_CONTROL void nexus_shim_set_order(int blocks, int threads, uint64_t seed) {
  control.block_order = static_cast<Order>(blocks);
  control.thread_order = static_cast<Order>(threads);
  control.random.seed(seed);
}

NEXUS_SHIM_CONTROL void nexus_shim_fail(const char* function, int calls_before, int error) {
  control.failures[function] = {calls_before, static_cast<cudaError_t>(error)};
}

NEXUS_SHIM_CONTROL int nexus_shim_calls(const char* function) {
  const auto calls = control.calls.find(function);
  return calls == control.calls.end() ? 0 : calls->second;
}

NEXUS_SHIM_CONTROL int nexus_shim_launch_count() { return static_cast<int>(control.launches.size()); }

NEXUS_SHIM_CONTROL void nexus_shim_launch(int index, Launch* out) { *out = control.launches[index]; }

NEXUS_SHIM_CONTROL const char* nexus_shim_fault() { return control.fault.c_str(); }
