// Streams, launches, and what is captured of them.
#include <dlfcn.h>

#include <algorithm>

#include "control.h"

struct CUstream_st {
  int device;
};

namespace nexus_shim {

Control control;

namespace {

std::vector<cudaStream_t> streams;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

cudaError_t invalidated() {
  control.graphs.back().valid = false;
  return cudaErrorStreamCaptureUnsupported;
}

cudaError_t checked(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim;
  const dim3 block = config.blockDim;
  const uint64_t block_size = uint64_t{block.x} * block.y * block.z;
  if (control.devices == 0) {
    return cudaErrorNoDevice;
  }
  if (device_of(config.stream) != current_device) {
    return cudaErrorInvalidResourceHandle;
  }
  if (block_size == 0 || block_size > kMaxThreads || block.z > 64 || grid.x == 0 || grid.x > INT32_MAX ||
      grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  return cudaSuccess;
}

}  // namespace

int device_of(cudaStream_t stream) {
  if (stream == nullptr) {
    return current_device;
  }
  return std::find(streams.begin(), streams.end(), stream) == streams.end() ? -1 : stream->device;
}

bool is_captured(cudaStream_t stream) { return control.capturing && stream == control.graphs.back().stream; }

cudaError_t may_wait(const char* function) {
  if (!control.capturing || control.graphs.back().relaxed || capture_mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  control.fault = std::string(function) + " in a capture";
  return invalidated();
}

cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (!is_captured(stream)) {
    return work();
  }
  if (!control.graphs.back().valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  control.graphs.back().nodes.push_back(std::move(work));
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::shared_ptr<Call> call) {
  const dim3 grid = config.gridDim;
  const dim3 block = config.blockDim;
  Dl_info library;
  dladdr(kernel, &library);
  control.launches.push_back({static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase),
                              {grid.x, grid.y, grid.z},
                              {block.x, block.y, block.z},
                              config.stream,
                              current_device,
                              is_captured(config.stream)});
  if (const cudaError_t error = called("cudaLaunchKernelEx"); error != cudaSuccess) {
    return remembered(error);
  }
  if (const cudaError_t error = checked(config); error != cudaSuccess) {
    return remembered(error);
  }
  const auto work = [config, call, device = current_device] { return run(config, device, call.get()); };
  return remembered(enqueue(config.stream, work));
}

}  // namespace nexus_shim

using namespace nexus_shim;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  if (const cudaError_t error = called(__func__); error != cudaSuccess) {
    return remembered(error);
  }
  streams.push_back(*stream = new CUstream_st{current_device});
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  if (const cudaError_t error = called(__func__); error != cudaSuccess) {
    return remembered(error);
  }
  if (stream == nullptr || device_of(stream) < 0) {
    return remembered(cudaErrorInvalidResourceHandle);
  }
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = called(__func__); error != cudaSuccess) {
    return remembered(error);
  }
  if (device_of(stream) < 0) {
    return remembered(cudaErrorInvalidResourceHandle);
  }
  return remembered(is_captured(stream) ? invalidated() : may_wait(__func__));
}

cudaError_t cudaDeviceSynchronize() {
  const cudaError_t error = called(__func__);
  return remembered(error == cudaSuccess && control.capturing ? invalidated() : error);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id) {
  const bool captured = is_captured(stream);
  *status = cudaStreamCaptureStatusNone;
  if (captured) {
    *status =
        control.graphs.back().valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    if (id != nullptr) {
      *id = control.graphs.size();
    }
  }
  return remembered(called(__func__));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const cudaError_t error = called(__func__);
  return error == cudaSuccess ? cudaStreamGetCaptureInfo(stream, status) : remembered(error);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return remembered(called(__func__));
}

// The graph's number.
NEXUS_SHIM_CONTROL int nexus_shim_begin_capture(void* stream, int relaxed) {
  control.graphs.push_back({static_cast<cudaStream_t>(stream), relaxed != 0, true, {}});
  control.capturing = true;
  return static_cast<int>(control.graphs.size()) - 1;
}

NEXUS_SHIM_CONTROL int nexus_shim_end_capture() {
  control.capturing = false;
  return control.graphs.back().valid ? cudaSuccess : cudaErrorStreamCaptureInvalidated;
}

NEXUS_SHIM_CONTROL int nexus_shim_replay(int graph) {
  for (const auto& node : control.graphs[graph].nodes) {
    if (const cudaError_t error = node()) {
      return error;
    }
  }
  return cudaSuccess;
}

NEXUS_SHIM_CONTROL void* nexus_shim_stream(int device) {
  streams.push_back(new CUstream_st{device});
  return streams.back();
}

NEXUS_SHIM_CONTROL int nexus_shim_streams(int device) {
  return static_cast<int>(
      std::count_if(streams.begin(), streams.end(), [=](cudaStream_t s) { return s->device == device; }));
}

// Whether the calling thread's mode is what it was at first.
NEXUS_SHIM_CONTROL int nexus_shim_capture_mode() { return capture_mode; }
