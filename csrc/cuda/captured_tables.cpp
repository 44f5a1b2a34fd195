#include "captured_tables.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "launch.h"

namespace nexus::cuda {
namespace {

// A stream of a device that waits for no other and lasts as long as the process, as the stream of an
// allocation has to.
cudaStream_t side_stream(int device) {
  static std::mutex mutex;
  static std::map<int, cudaStream_t> streams;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaStream_t& stream = streams[device];
  if (stream == nullptr) {
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  }
  return stream;
}

// Lets what is enqueued on `stream` from now on wait for what is on `other`.
void wait_for(cudaStream_t stream, cudaStream_t other) {
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  cudaError_t error = cudaEventRecord(event, other);
  if (error == cudaSuccess) {
    error = cudaStreamWaitEvent(stream, event, 0);
  }
  cudaEventDestroy(event);
  check(error, "ordering two streams");
}

// Lets a graph hold memory, and every executable graph that is made of it: each lets go when it is destroyed
// or, CUDA promises, when the replay that is then running has ended. So nothing on a device uses memory that
// graphs have let go of.
void hold(cudaGraph_t graph, const Memory& memory) {
  auto held = std::make_unique<Memory>(memory);
  const auto let_go = [](void* held) { delete static_cast<Memory*>(held); };
  cudaUserObject_t object = nullptr;
  check(cudaUserObjectCreate(&object, held.get(), let_go, 1, cudaUserObjectNoDestructorSync),
        "making an owner of a captured step's table");
  held.release();
  const cudaError_t error = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (error != cudaSuccess) {
    cudaUserObjectRelease(object, 1);
  }
  check(error, "giving a graph the table of a captured step");
}

}  // namespace

cudaGraph_t graph_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  check(cudaStreamGetCaptureInfo(stream, &status, nullptr, &graph),
        "asking whether the stream is being captured");
  if (status == cudaStreamCaptureStatusInvalidated) {
    check(cudaErrorStreamCaptureInvalidated, "capturing a step");
  }
  return status == cudaStreamCaptureStatusActive ? graph : nullptr;
}

OutsideCapture::OutsideCapture() {
  check(cudaThreadExchangeStreamCaptureMode(&mode_), "leaving the capture");
}

OutsideCapture::~OutsideCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

const Table& CapturedTables::table(int device, const Contents& contents, cudaGraph_t graph) {
  const OutsideCapture outside;
  forget_dropped();
  for (const Captured& captured : tables_) {
    const Memory memory = captured.memory.lock();
    if (memory != nullptr && captured.table->device() == device && captured.table->holds(contents)) {
      hold(graph, memory);
      return captured.table->get();
    }
  }
  const cudaStream_t side = side_stream(device);
  auto table = std::make_unique<DeviceTable>(device, allocate_);
  table->write(contents, side);
  check(cudaStreamSynchronize(side), "writing the table of a captured step");
  const Memory memory = table->take_memory();
  hold(graph, memory);
  tables_.push_back({std::move(table), memory});
  return tables_.back().table->get();
}

void CapturedTables::write_groups(int device, const Contents& contents, cudaStream_t stream) {
  forget_dropped();
  if (!tables_.empty() && graph_of(stream) != nullptr) {
    throw std::runtime_error(
        "captured steps are given other hyperparameters between replays, and not while the stream is "
        "captured: each replay of that graph would write them again");
  }
  for (const Captured& captured : tables_) {
    const Memory memory = captured.memory.lock();
    if (memory != nullptr && captured.table->device() == device) {
      captured.table->write_groups(contents, stream);
      wait_for(side_stream(device), stream);  // before the memory, let go of, serves another table
    }
  }
}

bool CapturedTables::empty() {
  forget_dropped();
  return tables_.empty();
}

void CapturedTables::forget_dropped() {
  const auto is_dropped = [](const Captured& captured) { return captured.memory.expired(); };
  tables_.erase(std::remove_if(tables_.begin(), tables_.end(), is_dropped), tables_.end());
}

}  // namespace nexus::cuda
