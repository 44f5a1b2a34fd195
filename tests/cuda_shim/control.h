// What the files of the shim share.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#define NEXUS_SHIM_CONTROL extern "C" __attribute__((visibility("default")))

namespace nexus_shim {

constexpr int kMaxThreads = 1024;

enum class Order : int { kAscending, kDescending, kShuffled };

struct Launch {
  int64_t kernel;  // its offset in this library
  uint32_t grid[3];
  uint32_t block[3];
  cudaStream_t stream;
  int32_t device;
  int32_t captured;
};

struct PlannedFailure {
  int calls_before;
  cudaError_t error;
};

// What was enqueued while a stream was captured.
struct Graph {
  cudaStream_t stream;
  bool relaxed;
  bool valid;
  std::vector<std::function<cudaError_t()>> nodes;
};

// All that tests can set and read.
struct Control {
  int devices = 1;
  int multiprocessors = 4;
  int capability[2] = {9, 0};
  Order block_order = Order::kAscending;
  Order thread_order = Order::kAscending;
  std::mt19937_64 random{0};
  std::map<std::string, PlannedFailure> failures;
  std::map<std::string, int> calls;  // of each function
  std::vector<Launch> launches;
  std::string fault;
  std::vector<Graph> graphs;
  bool capturing = false;  // into the last of the graphs
};

extern Control control;
extern std::mutex one_launch;  // kernels, and what changes the memory that they see, one at a time

extern thread_local int current_device;

// To be called first in each of CUDA's functions: what a test asked this call of it to return.
cudaError_t called(const char* function);

// Notes an error for cudaGetLastError(), and returns it.
cudaError_t remembered(cudaError_t error);

// Calls that may wait for a device end a capture, unless it or the calling thread is relaxed about them.
cudaError_t may_wait(const char* function);

// Runs `work` now or, where the stream is captured, keeps it.
cudaError_t enqueue(cudaStream_t stream, std::function<cudaError_t()> work);

bool is_captured(cudaStream_t stream);

// The stream's device, the current one for the null stream, or -1 where there is no such stream.
int device_of(cudaStream_t stream);

// While it lives, memory of this device is accessible, or that of all devices for -1.
class Access {
 public:
  explicit Access(int device);
  ~Access();

 private:
  int device_;
};

// Forgets freed memory.
void forget_freed();

// Runs the blocks one after another.
cudaError_t run(const cudaLaunchConfig_t& config, int device, Call* call);

// Ends the launch that runs, which returns `error`.
[[noreturn]] void stop(cudaError_t error, const std::string& what);

}  // namespace nexus_shim
