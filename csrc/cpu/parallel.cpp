// torch brings an OpenMP runtime whose threads spin for a while after each region, waiting for the next. A
// second pool would fight them for the cores. So the runtime that this process has already loaded is looked
// up, and entered through GOMP_parallel, which GNU's, LLVM's and Intel's runtimes all export. Where there is
// none, and in a forked child (whose copy of the pool has no threads: entering it would hang), plain threads
// do the work.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <exception>
#include <string>
#include <thread>
#include <vector>
#ifdef __linux__
#include <link.h>
#endif

namespace nexus::cpu {
namespace {

using Region = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

struct Runtime {
  Region enter = nullptr;
  int (*thread_number)() = nullptr;
  std::string name = "std::thread";
};

std::atomic<bool> forked{false};

// From the time this module is loaded: torch may have used the pool before nexus does.
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

#ifdef __linux__
// Prefers the runtime in torch's own folder to any other that the process has loaded.
int find_openmp(dl_phdr_info* info, size_t, void* found) {
  auto& path = *static_cast<std::string*>(found);
  const std::string candidate = info->dlpi_name;
  const std::string file = candidate.substr(candidate.rfind('/') + 1);
  if (file.rfind("libgomp", 0) == 0 || file.rfind("libomp", 0) == 0 || file.rfind("libiomp", 0) == 0) {
    if (path.empty() || candidate.find("/torch") != std::string::npos) {
      path = candidate;
    }
  }
  return 0;
}
#endif

Runtime find_runtime() {
  Runtime runtime;
#ifdef __linux__
  std::string path;
  dl_iterate_phdr(find_openmp, &path);
  if (!path.empty()) {
    if (void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
      void* enter = dlsym(library, "GOMP_parallel");
      void* thread_number = dlsym(library, "omp_get_thread_num");
      if (enter != nullptr && thread_number != nullptr) {
        runtime.enter = reinterpret_cast<Region>(enter);
        runtime.thread_number = reinterpret_cast<int (*)()>(thread_number);
        runtime.name = path.substr(path.rfind('/') + 1);
      }
    }
  }
#endif
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

}  // namespace

void run_parallel(int threads, void (*work)(void*, int), void* context) {
  if (threads <= 1) {
    work(context, 0);
    return;
  }
  const Runtime& found = runtime();
  if (found.enter != nullptr && !forked) {
    struct Call {
      void (*work)(void*, int);
      void* context;
      int (*thread_number)();
    } call{work, context, found.thread_number};
    found.enter(
        [](void* data) {
          const auto& c = *static_cast<const Call*>(data);
          c.work(c.context, c.thread_number());
        },
        &call, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) {
      others.emplace_back(work, context, i);
    }
  } catch (const std::exception&) {
    // No more threads to be had: those that there are do it all.
  }
  work(context, 0);
  for (std::thread& other : others) {
    other.join();
  }
}

const char* thread_runtime() { return runtime().name.c_str(); }

}  // namespace nexus::cpu
