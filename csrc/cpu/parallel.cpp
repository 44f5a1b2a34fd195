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
#if defined(__linux__)
#include <link.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
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

std::vector<std::string> loaded_libraries() {
  std::vector<std::string> paths;
#if defined(__linux__)
  const auto add = [](dl_phdr_info* info, size_t, void* to) {
    static_cast<std::vector<std::string>*>(to)->emplace_back(info->dlpi_name);
    return 0;
  };
  dl_iterate_phdr(add, &paths);
#elif defined(__APPLE__)
  for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
    if (const char* path = _dyld_get_image_name(i)) {  // null once it is unloaded
      paths.emplace_back(path);
    }
  }
#endif
  return paths;
}

std::string file_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// Prefers the runtime in torch's own folder to any other that the process has loaded.
std::string find_openmp() {
  std::string found;
  for (const std::string& path : loaded_libraries()) {
    const std::string file = file_name(path);
    if (file.rfind("libgomp", 0) == 0 || file.rfind("libomp", 0) == 0 || file.rfind("libiomp", 0) == 0) {
      if (found.empty() || path.find("/torch") != std::string::npos) {
        found = path;
      }
    }
  }
  return found;
}

Runtime find_runtime() {
  Runtime runtime;
  const std::string path = find_openmp();
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr) {
    void* enter = dlsym(library, "GOMP_parallel");
    void* thread_number = dlsym(library, "omp_get_thread_num");
    if (enter != nullptr && thread_number != nullptr) {
      runtime.enter = reinterpret_cast<Region>(enter);
      runtime.thread_number = reinterpret_cast<int (*)()>(thread_number);
      runtime.name = file_name(path);
    }
  }
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
