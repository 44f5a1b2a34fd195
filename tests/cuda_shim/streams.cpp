// Streams, events, launches, and graphs of what is captured of them.
#include <dlfcn.h>

#include <algorithm>
#include <thread>

#include "control.h"

struct CUstream_st {
  int device;
};

struct CUevent_st {
  bool captured;  // what it waits for
};

struct CUuserObject_st {
  void* pointer;
  cudaHostFn_t destroy;
  unsigned references;
};

namespace nexus_shim {
namespace {

std::vector<cudaStream_t> streams;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

bool is_captured(cudaStream_t stream) {
  return control.capturing != nullptr && stream == control.capturing->stream;
}

cudaError_t invalidated() {
  control.capturing->valid = false;
  return cudaErrorStreamCaptureUnsupported;
}

// Runs `work` now or, where the stream is captured, keeps it.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work) {
  if (!is_captured(stream)) {
    return work();
  }
  if (!control.capturing->valid) {
    return cudaErrorStreamCaptureInvalidated;
  }
  control.capturing->nodes.push_back(std::move(work));
  return cudaSuccess;
}

void release(cudaUserObject_t object) {
  if (--object->references == 0) {
    std::thread([=] {
      is_callback = true;
      object->destroy(object->pointer);
    }).join();
    delete object;
  }
}

int added(std::unique_ptr<CUgraph_st> graph) {
  static int number = 0;  // of none that was there before reset()
  control.graphs[++number] = std::move(graph);
  return number;
}

}  // namespace

int device_of(cudaStream_t stream) {
  if (stream == nullptr) {
    return current_device;
  }
  return std::find(streams.begin(), streams.end(), stream) == streams.end() ? -1 : stream->device;
}

cudaError_t may_wait(const char* function) {
  if (control.capturing == nullptr || capture_mode == cudaStreamCaptureModeRelaxed) {
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

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return called(__func__, [=, function = __func__] {
    if (device_of(stream) < 0) {
      return cudaErrorInvalidResourceHandle;
    }
    return is_captured(stream) ? invalidated() : may_wait(function);
  });
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long*, cudaGraph_t* graph) {
  return called(__func__, [=] {
    *status = cudaStreamCaptureStatusNone;
    if (is_captured(stream)) {
      const bool valid = control.capturing->valid;
      *status = valid ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
      *graph = valid ? control.capturing : nullptr;
    }
    return cudaSuccess;
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return called(__func__, [=] {
    *event = new CUevent_st{false};
    return cudaSuccess;
  });
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return called(__func__, [=] {
    event->captured = is_captured(stream);
    return cudaSuccess;
  });
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return called(__func__, [=] {
    delete event;
    return cudaSuccess;
  });
}

// A stream that waits for a captured one becomes part of the capture, on a device. Here no stream does.
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return called(__func__, [=] {
    if (device_of(stream) < 0) {
      return cudaErrorInvalidResourceHandle;
    }
    return event->captured ? invalidated() : cudaSuccess;
  });
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* pointer, cudaHostFn_t destroy,
                                 unsigned references, unsigned flags) {
  return called(__func__, [=] {
    if (flags != cudaUserObjectNoDestructorSync) {
      return cudaErrorInvalidValue;
    }
    *object = new CUuserObject_st{pointer, destroy, references};
    return cudaSuccess;
  });
}

cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned count) {
  return called(__func__, [=] {
    for (unsigned i = 0; i < count; ++i) {
      release(object);
    }
    return cudaSuccess;
  });
}

cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags) {
  return called(__func__, [=] {
    graph->held.insert(graph->held.end(), count, object);
    object->references += flags == cudaGraphUserObjectMove ? 0 : count;
    return cudaSuccess;
  });
}

CUgraph_st::CUgraph_st(const CUgraph_st& other)
    : stream(other.stream), valid(other.valid), nodes(other.nodes), held(other.held) {
  for (const cudaUserObject_t object : held) {
    ++object->references;
  }
}

CUgraph_st::~CUgraph_st() {
  for (const cudaUserObject_t object : held) {
    release(object);
  }
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return called(__func__, [=] {
    std::swap(*mode, capture_mode);
    return cudaSuccess;
  });
}

// The graph's number. A capture that fails leaves none.
NEXUS_SHIM_CONTROL int nexus_shim_begin_capture(void* stream) {
  auto graph = std::make_unique<CUgraph_st>(static_cast<cudaStream_t>(stream));
  control.capturing = graph.get();
  return added(std::move(graph));
}

NEXUS_SHIM_CONTROL int nexus_shim_end_capture() {
  const cudaGraph_t graph = std::exchange(control.capturing, nullptr);
  if (graph->valid) {
    return cudaSuccess;
  }
  const auto is_it = [=](const auto& numbered) { return numbered.second.get() == graph; };
  control.graphs.erase(std::find_if(control.graphs.begin(), control.graphs.end(), is_it));
  return cudaErrorStreamCaptureInvalidated;
}

NEXUS_SHIM_CONTROL int nexus_shim_replay(int graph) {
  const auto found = control.graphs.find(graph);
  if (found == control.graphs.end()) {
    return cudaErrorInvalidValue;
  }
  for (const auto& node : found->second->nodes) {
    if (const cudaError_t error = node()) {
      return error;
    }
  }
  return cudaSuccess;
}

// The number of another graph that does the same, and holds the same.
NEXUS_SHIM_CONTROL int nexus_shim_instantiate(int graph) {
  return added(std::make_unique<CUgraph_st>(*control.graphs.at(graph)));
}

NEXUS_SHIM_CONTROL void nexus_shim_destroy(int graph) { control.graphs.erase(graph); }

NEXUS_SHIM_CONTROL void* nexus_shim_stream(int device) {
  streams.push_back(new CUstream_st{device});
  return streams.back();
}

// Whether the calling thread's mode is what it was at first.
NEXUS_SHIM_CONTROL bool nexus_shim_capture_mode_is_global() {
  return capture_mode == cudaStreamCaptureModeGlobal;
}
