// Streams, launches, and what is captured of them.
#include <dlfcn.h>

#include <algorithm>

#include "control.h"

struct CUstream_st {
  int device;
};

namespace nexus_shim {
namespace {

std::vector<cudaStream_t> streams;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

bool is_captured(cudaStream_t stream) { return control.capturing && stream == control.graphs.back().stream; }

cudaError_t invalidated() {
  control.graphs.back().valid = false;
  return cudaErrorStreamCaptureUnsupported;
}

// Runs `work` now or, where the stream is captured, keeps it.
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

}  // namespace

int device_of(cudaStream_t stream) {
  if (stream == nullptr) {
    return current_device;
  }
  return std::find(streams.begin(), streams.end(), stream) == streams.end() ? -1 : stream->device;
}

cudaError_t may_wait(const char* function) {
  if (!control.capturing || capture_mode == cudaStreamCaptureModeRelaxed) {
    return cudaSuccess;
  }
  control.fault = std::string(function) + " in a capture";
  return invalidated();
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, std::shared_ptr<Call> call) {
  Dl_info library;
  dladdr(kernel, &library);
  control.launches.push_back({static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase),
                              config.gridDim.x, reinterpret_cast<int64_t>(config.stream), current_device,
                              is_captured(config.stream)});
  return called("cudaLaunchKernelEx", [&] {
    if (device_of(config.stream) != current_device) {
      return cudaErrorInvalidResourceHandle;
    }
    const unsigned threads = config.blockDim.x;
    if (threads == 0 || threads > kMaxThreads || config.gridDim.x == 0 || config.gridDim.x > INT32_MAX) {
      return cudaErrorInvalidConfiguration;
    }
    return enqueue(config.stream,
                   [config, call, device = current_device] { return run(config, device, call.get()); });
  });
}

}  // namespace nexus_shim

using namespace nexus_shim;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return called(__func__, [=] {
    streams.push_back(*stream = new CUstream_st{current_device});
    return cudaSuccess;
  });
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return called(__func__, [=] {
    if (stream == nullptr || device_of(stream) < 0) {
      return cudaErrorInvalidResourceHandle;
    }
    streams.erase(std::find(streams.begin(), streams.end(), stream));
    delete stream;
    return cudaSuccess;
  });
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return called(__func__, [=, function = __func__] {
    if (device_of(stream) < 0) {
      return cudaErrorInvalidResourceHandle;
    }
    return is_captured(stream) ? invalidated() : may_wait(function);
  });
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return called(__func__, [=] {
    *status = cudaStreamCaptureStatusNone;
    if (is_captured(stream)) {
      const bool valid = control.graphs.back().valid;
      *status = valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
    }
    return cudaSuccess;
  });
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return called(__func__, [=] {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
  });
}

// The graph's number.
NEXUS_SHIM_CONTROL int nexus_shim_begin_capture(void* stream) {
  control.graphs.push_back({static_cast<cudaStream_t>(stream), true, {}});
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

// Whether the calling thread's mode is what it was at first.
NEXUS_SHIM_CONTROL bool nexus_shim_capture_mode_is_global() {
  return capture_mode == cudaStreamCaptureModeGlobal;
}
