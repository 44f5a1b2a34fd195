// Errors, devices and functions; and nexus_shim_*(), which controls.py calls.
#include "control.h"

namespace nexus_shim {

Control control;

thread_local int current_device = 0;
thread_local bool is_callback = false;

namespace {

thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) {
    last_error = error;
  }
  return error;
}

cudaError_t called(const char* function, const std::function<cudaError_t()>& work) {
  if (is_callback) {
    control.fault = std::string(function) + " in a callback";
    return cudaErrorNotPermitted;
  }
  ++control.calls[function];
  const auto failure = control.failures.find(function);
  if (failure == control.failures.end() || failure->second.calls_before-- > 0) {
    return remembered(work());
  }
  const cudaError_t error = failure->second.error;
  control.failures.erase(failure);
  return remembered(error);
}

}  // namespace nexus_shim

using namespace nexus_shim;

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
#define NEXUS_SHIM_CASE(name, value) \
  case name:                         \
    return #name;
    NEXUS_SHIM_ERRORS(NEXUS_SHIM_CASE)
#undef NEXUS_SHIM_CASE
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  return called(__func__, [=] {
    *device = current_device;
    return cudaSuccess;
  });
}

cudaError_t cudaSetDevice(int device) {
  return called(__func__, [=] {
    if (device < 0 || device >= control.devices) {
      return cudaErrorInvalidDevice;
    }
    current_device = device;
    return cudaSuccess;
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return called(__func__, [=] {
    attributes->maxThreadsPerBlock = kMaxThreads;
    return cudaSuccess;
  });
}

NEXUS_SHIM_CONTROL void nexus_shim_reset() {
  control = {};
  last_error = cudaSuccess;
  current_device = 0;
  forget_freed();
}

NEXUS_SHIM_CONTROL void nexus_shim_set_devices(int count) { control.devices = count; }

NEXUS_SHIM_CONTROL void nexus_shim_set_order(int blocks, int threads, uint64_t seed) {
  control.block_order = static_cast<Order>(blocks);
  control.thread_order = static_cast<Order>(threads);
  control.random.seed(seed);
}

NEXUS_SHIM_CONTROL void nexus_shim_set_ends(unsigned blocks) { control.ends = blocks; }

NEXUS_SHIM_CONTROL void nexus_shim_fail(const char* function, int calls_before, int error) {
  control.failures[function] = {calls_before, static_cast<cudaError_t>(error)};
}

NEXUS_SHIM_CONTROL int nexus_shim_calls(const char* function) { return control.calls[function]; }

NEXUS_SHIM_CONTROL int nexus_shim_launch_count() { return static_cast<int>(control.launches.size()); }

NEXUS_SHIM_CONTROL void nexus_shim_launch(int index, Launch* out) { *out = control.launches[index]; }

NEXUS_SHIM_CONTROL const char* nexus_shim_fault() { return control.fault.c_str(); }
