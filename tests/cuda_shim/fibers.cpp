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

dim3 threadIdx;
dim3 blockIdx;
dim3 blockDim;
dim3 gridDim;

// The edges of the variables declared __shared__.
extern "C" __attribute__((visibility("hidden"))) __thread char nexus_shim_shared_begin[16];
extern "C" __attribute__((visibility("hidden"))) __thread char nexus_shim_shared_end[16];

namespace nexus_shim {

std::mutex one_launch;

namespace {

enum class State : int { kReady, kAtBarrier, kAtShuffle, kDone };

// A thread of a block, with a stack that later blocks use again.
struct Thread {
  State state;
  uint64_t brought;  // to a shuffle
  unsigned source;   // the lane whose bits it takes from there
  uint64_t received;
  ucontext_t start;
  jmp_buf context;
  bool started;
};

// Of the block that runs.
Call* call = nullptr;
Thread threads[kMaxThreads];
unsigned size = 0;
unsigned done = 0;
unsigned arrived = 0;  // of those at the block's barrier
unsigned current = 0;
jmp_buf scheduler;
cudaError_t fault = cudaSuccess;
thread_local bool in_kernel = false;

// Lets others run, until this thread is resumed.
void wait(State state) {
  threads[current].state = state;
  if (_setjmp(threads[current].context) == 0) {
    _longjmp(scheduler, 1);
  }
}

void run_thread() {
  for (;;) {
    call->run();
    ++done;
    wait(State::kDone);
  }
}

void start(Thread& thread) {
  if (thread.start.uc_stack.ss_sp == nullptr) {
    constexpr size_t kStack = 128 << 10;
    constexpr size_t kGuard = 4 << 10;  // faults when a stack overflows
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      throw std::bad_alloc();
    }
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = static_cast<char*>(memory) + kGuard;
    thread.start.uc_stack.ss_size = kStack;
  }
  makecontext(&thread.start, run_thread, 0);
  thread.started = true;
  setcontext(&thread.start);
}

// Returns when the thread waits, when it is done, or at a fault.
void resume(unsigned thread) {
  threadIdx = current = thread;
  if (_setjmp(scheduler) == 0) {
    if (threads[thread].started) {
      _longjmp(threads[thread].context, 1);
    }
    start(threads[thread]);
  }
}

}  // namespace

[[noreturn]] void stop(cudaError_t error, const std::string& what) {
  if (!in_kernel) {
    fprintf(stderr, "%s, outside of a kernel\n", what.c_str());
    abort();
  }
  fault = error;
  control.fault = what + " in thread " + std::to_string(current) + " of block " + std::to_string(blockIdx.x);
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

std::vector<unsigned> arranged(unsigned count, Order how) {
  std::vector<unsigned> items(count);
  std::iota(items.begin(), items.end(), 0u);
  if (how == Order::kDescending) {
    std::reverse(items.begin(), items.end());
  } else if (how == Order::kShuffled) {
    std::shuffle(items.begin(), items.end(), control.random);
  }
  return items;
}

void note_deadlock() {
  const auto waits = [](const Thread& thread) { return thread.state != State::kDone; };
  const Thread* waiting = std::find_if(threads, threads + size, waits);
  fault = cudaErrorLaunchTimeout;
  control.fault =
      "thread " + std::to_string(waiting - threads) + " of block " + std::to_string(blockIdx.x) +
      " waits forever at " + (waiting->state == State::kAtShuffle ? "a shuffle" : "__syncthreads()") + ": " +
      std::to_string(size - done) + " threads of the block wait, " + std::to_string(done) + " have returned";
}

void run_block(const std::vector<unsigned>& order) {
  memset(nexus_shim_shared_begin, 0xCC, nexus_shim_shared_end - nexus_shim_shared_begin);
  std::for_each(threads, threads + size, [](Thread& thread) { thread.state = State::kReady; });
  done = arrived = 0;
  while (done < size && fault == cudaSuccess) {
    bool stuck = true;
    for (const unsigned thread : order) {
      if (threads[thread].state == State::kReady && fault == cudaSuccess) {
        stuck = false;
        resume(thread);
      }
    }
    if (stuck) {
      note_deadlock();
    }
  }
  if (fault != cudaSuccess) {  // their frames are abandoned
    std::for_each(threads, threads + size, [](Thread& thread) { thread.started = false; });
  }
}

}  // namespace

cudaError_t run(const cudaLaunchConfig_t& config, int device, Call* kernel_call) {
  const std::lock_guard<std::mutex> lock(one_launch);
  set_access(device, true);
  const SegmentationFaults caught;
  call = kernel_call;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  size = blockDim.x;
  fault = cudaSuccess;
  for (const unsigned block : arranged(gridDim.x, control.block_order)) {
    if (block >= control.ends && gridDim.x - block > control.ends) {
      continue;
    }
    blockIdx = block;
    run_block(arranged(size, control.thread_order));
    if (fault != cudaSuccess) {
      break;
    }
  }
  set_access(device, false);
  return fault;
}

unsigned lane() { return current % 32; }

void wait_for_block() {
  if (++arrived < size) {
    wait(State::kAtBarrier);
    return;
  }
  arrived = 0;
  std::for_each(threads, threads + size, [](Thread& thread) { thread.state = State::kReady; });
}

uint64_t wait_for_warp(uint64_t bits, unsigned source) {
  Thread& self = threads[current];
  Thread* const warp = &self - lane();
  Thread* const end = warp + 32;
  self.brought = bits;
  self.source = source;
  const auto waits = [&](const Thread& thread) {
    return &thread == &self || thread.state == State::kAtShuffle;
  };
  if (!std::all_of(warp, end, waits)) {
    wait(State::kAtShuffle);
    return self.received;
  }
  std::for_each(warp, end, [=](Thread& thread) {
    thread.received = warp[thread.source].brought;
    thread.state = State::kReady;
  });
  return self.received;
}

}  // namespace nexus_shim
