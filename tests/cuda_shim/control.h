// What the files of the shim share.
#pragma once

#include <climits>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#define NEXUS_SHIM_CONTROL extern "C" __attribute__((visibility("default")))

// What was enqueued while a stream was captured, and what this holds.
struct CUgraph_st {
  explicit CUgraph_st(cudaStream_t stream) : stream(stream) {}
  CUgraph_st(const CUgraph_st& other);
  ~CUgraph_st();

  cudaStream_t stream;
  bool valid = true;
  std::vector<std::function<cudaError_t()>> nodes;
  std::vector<cudaUserObject_t> held;
};

namespace nexus_shim {

constexpr unsigned kMaxThreads = 1024;

enum class Order : int { kAscending, kDescending, kShuffled };

struct Launch {
  int64_t kernel;  // its offset in this library
  int64_t grid;
  int64_t stream;
  int64_t device;
  int64_t captured;
};

struct PlannedFailure {
  int calls_before;
  cudaError_t error;
};

// All that tests can set and read.
struct Control {
  int devices = 1;
  Order block_order = Order::kAscending;
  Order thread_order = Order::kAscending;
  unsigned ends = UINT_MAX;  // of a grid: how many of its first blocks run, and of its last
  std::mt19937_64 random{0};
  std::map<std::string, PlannedFailure> failures;
  std::map<std::string, int> calls;  // of each function
  std::vector<Launch> launches;
  std::string fault;
  std::map<int, std::unique_ptr<CUgraph_st>> graphs;
  cudaGraph_t capturing = nullptr;  // into this one of the graphs
};

extern Control control;
extern std::mutex one_launch;  // kernels, and what changes the memory that they see, one at a time

extern thread_local int current_device;
extern thread_local bool is_callback;  // this thread is CUDA's own, and must not call CUDA

// Notes an error for cudaGetLastError(), and returns it.
cudaError_t remembered(cudaError_t error);

// One call of a function: what a test asked it to return or, if none did, what `work` returns.
cudaError_t called(const char* function, const std::function<cudaError_t()>& work);

// Calls that may wait for a device end a capture, unless the calling thread is relaxed about them.
cudaError_t may_wait(const char* function);

// The stream's device, the current one for the null stream, or -1 where there is no such stream.
int device_of(cudaStream_t stream);

// Opens or closes the memory of a device.
void set_access(int device, bool open);

// Forgets freed memory.
void forget_freed();

// Runs the blocks one after another.
cudaError_t run(const cudaLaunchConfig_t& config, int device, Call* call);

// Ends the launch that runs, which returns `error`.
[[noreturn]] void stop(cudaError_t error, const std::string& what);

}  // namespace nexus_shim
