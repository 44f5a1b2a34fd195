// Runs a kernel: block after block, and a block's threads as fibers.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <numeric>

#include "control.h"

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

// The edges of the variables declared __shared__.
extern "C" __attribute__((visibility("hidden"))) __thread char nexus_shim_shared_begin[16];
extern "C" __attribute__((visibility("hidden"))) __thread char nexus_shim_shared_end[16];

namespace nexus_shim {

std::mutex one_launch;

namespace {

constexpr uint64_t kPoison = 0xCCCCCCCCCCCCCCCC;

// A stack on which threads run: one after another, until one waits and keeps it.
struct Fiber {
  ucontext_t start;
  jmp_buf context;
  bool started = false;
};

enum class State : int { kReady, kWaiting, kDone };

struct Thread {
  State state;
  Barrier barrier;
  int fiber;
  bool predicate;
  unsigned mask;
  uint64_t bits;
  int source;
  uint64_t received;
};

// Of the block that runs.
Call* call = nullptr;
Thread threads[kMaxThreads];
int order[kMaxThreads];
int size = 0;
int begun = 0;
int done = 0;
int arrived = 0;  // of those at a barrier of the block
int current = -1;
Fiber fibers[kMaxThreads];
int fibers_in_use = 0;
int running_fiber = 0;
jmp_buf scheduler;
cudaError_t fault = cudaSuccess;
thread_local bool in_kernel = false;

void enter(int thread) {
  current = thread;
  const unsigned t = static_cast<unsigned>(thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}

// The threads that nobody has begun run here, until one of them waits; then the scheduler takes another
// fiber. A kernel without barriers so needs a single one.
void run_threads() {
  for (;;) {
    while (begun < size) {
      const int thread = order[begun++];
      threads[thread].fiber = running_fiber;
      enter(thread);
      call->run();
      threads[current].state = State::kDone;
      ++done;
    }
    if (_setjmp(fibers[running_fiber].context) == 0) {
      _longjmp(scheduler, 1);
    }
  }
}

void start(Fiber& fiber) {
  if (fiber.start.uc_stack.ss_sp == nullptr) {
    constexpr size_t kStack = 128 << 10;
    constexpr size_t kGuard = 4 << 10;  // faults when a stack overflows
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = static_cast<char*>(memory) + kGuard;
    fiber.start.uc_stack.ss_size = kStack;
  }
  makecontext(&fiber.start, run_threads, 0);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Returns when the fiber's thread waits, when all threads of the fiber are done, or at a fault.
void resume(int fiber) {
  running_fiber = fiber;
  if (_setjmp(scheduler) == 0) {
    if (fibers[fiber].started) {
      _longjmp(fibers[fiber].context, 1);
    }
    start(fibers[fiber]);
  }
}

}  // namespace

[[noreturn]] void stop(cudaError_t error, const std::string& what) {
  char where[128];
  snprintf(where, sizeof where, " in thread (%u, %u, %u) of block (%u, %u, %u)", threadIdx.x, threadIdx.y,
           threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  if (current < 0) {
    fprintf(stderr, "%s, outside of a kernel\n", what.c_str());
    abort();
  }
  fault = error;
  control.fault = what + where;
  _longjmp(scheduler, 1);
}

namespace {

struct sigaction outer_action;

void on_segmentation_fault(int, siginfo_t* info, void*) {
  if (!in_kernel) {  // somebody else's
    sigaction(SIGSEGV, &outer_action, nullptr);
    return;
  }
  char text[64];
  snprintf(text, sizeof text, "nothing is at address %p", info->si_addr);
  stop(cudaErrorIllegalAddress, text);
}

// Those of a kernel stop it, while this lives.
class SegmentationFaults {
 public:
  SegmentationFaults() {
    struct sigaction action = {};
    action.sa_sigaction = on_segmentation_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;  // stop() never returns here
    sigaction(SIGSEGV, &action, &outer_action);
    in_kernel = true;
  }
  ~SegmentationFaults() {
    in_kernel = false;
    sigaction(SIGSEGV, &outer_action, nullptr);
  }
};

void wait() {
  threads[current].state = State::kWaiting;
  if (_setjmp(fibers[running_fiber].context) == 0) {
    _longjmp(scheduler, 1);
  }
}

const char* name_of(Barrier kind) {
  static const char* const kNames[] = {
      "nothing", "__syncthreads()", "__syncthreads_or()", "__syncthreads_and()", "__syncwarp()", "a shuffle"};
  return kNames[static_cast<int>(kind)];
}

void arrange(std::vector<int>& items, Order how) {
  std::iota(items.begin(), items.end(), 0);
  if (how == Order::kDescending) {
    std::reverse(items.begin(), items.end());
  } else if (how == Order::kShuffled) {
    std::shuffle(items.begin(), items.end(), control.random);
  }
}

void run_block() {
  memset(nexus_shim_shared_begin, 0xCC, nexus_shim_shared_end - nexus_shim_shared_begin);
  std::fill_n(threads, size, Thread{});
  begun = done = arrived = fibers_in_use = 0;
  while (begun < size && fault == cudaSuccess) {
    resume(fibers_in_use++);
  }
  while (done < size && fault == cudaSuccess) {
    bool stuck = true;
    for (int i = 0; i < size && fault == cudaSuccess; ++i) {
      const Thread& thread = threads[order[i]];
      if (thread.state == State::kReady) {
        stuck = false;
        enter(order[i]);
        resume(thread.fiber);
      }
    }
    if (stuck) {
      const auto waits = [](const Thread& thread) { return thread.state == State::kWaiting; };
      const Thread* waiting = std::find_if(threads, threads + size, waits);
      enter(static_cast<int>(waiting - threads));
      fault = cudaErrorLaunchTimeout;
      control.fault = "thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x) +
                      " waits forever at " + name_of(waiting->barrier) + ": " +
                      std::to_string(std::count_if(threads, threads + size, waits)) +
                      " threads of the block wait, " + std::to_string(done) + " have returned";
    }
  }
  if (fault != cudaSuccess) {  // their frames are abandoned
    std::for_each(fibers, fibers + fibers_in_use, [](Fiber& fiber) { fiber.started = false; });
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, int device, Call* kernel_call) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const Access access(device);
  const SegmentationFaults caught;
  call = kernel_call;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  size = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  std::vector<int> blocks(static_cast<size_t>(gridDim.x) * gridDim.y * gridDim.z);
  std::vector<int> block_threads(size);
  arrange(blocks, control.block_order);
  fault = cudaSuccess;
  for (const int block : blocks) {
    arrange(block_threads, control.thread_order);
    std::copy(block_threads.begin(), block_threads.end(), order);
    const unsigned b = static_cast<unsigned>(block);
    blockIdx = {b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y};
    run_block();
    if (fault != cudaSuccess) {
      break;
    }
  }
  current = -1;
  return fault;
}

int lane() { return current % 32; }

int wait_for_block(Barrier kind, bool predicate) {
  Thread& self = threads[current];
  self.barrier = kind;
  self.predicate = predicate;
  if (++arrived < size) {
    wait();
    return static_cast<int>(self.received);
  }
  const int count =
      static_cast<int>(std::count_if(threads, threads + size, [](const Thread& t) { return t.predicate; }));
  for (int i = 0; i < size; ++i) {
    Thread& other = threads[i];
    if (other.barrier != kind) {
      stop(cudaErrorLaunchTimeout, std::string("one barrier for the block is ") + name_of(kind) +
                                       " here and " + name_of(other.barrier) + " elsewhere");
    }
    other.state = State::kReady;
    other.barrier = Barrier::kNone;
    other.received = static_cast<uint64_t>(count);
  }
  arrived = 0;
  return count;
}

uint64_t wait_for_warp(Barrier kind, unsigned mask, uint64_t bits, int source) {
  Thread& self = threads[current];
  Thread* warp = &threads[current / 32 * 32];
  const int lanes = std::min(32, size - current / 32 * 32);
  if ((mask >> lane() & 1u) == 0) {
    stop(cudaErrorLaunchFailure, std::string("the mask of ") + name_of(kind) + " lacks its own lane");
  }
  self.barrier = kind;
  self.mask = mask;
  self.bits = bits;
  self.source = source;
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1u) != 0 && (warp[i].barrier != kind || warp[i].mask != mask)) {
      wait();
      return self.received;
    }
  }
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1u) != 0) {
      const bool present = warp[i].source < lanes && (mask >> warp[i].source & 1u) != 0;
      warp[i].received = present ? warp[warp[i].source].bits : kPoison;
    }
  }
  for (int i = 0; i < lanes; ++i) {
    if ((mask >> i & 1u) != 0) {
      warp[i].state = State::kReady;
      warp[i].barrier = Barrier::kNone;
    }
  }
  return self.received;
}

}  // namespace nexus_shim
