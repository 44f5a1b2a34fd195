// The devices' memory. An allocation has pages of its own, which are closed to the host, and to kernels on
// other devices; its end lies at the end of a page, the next one is never open, and freed ones stay closed.
#include <sys/mman.h>

#include "control.h"

namespace nexus_shim {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kAlignment = 256;  // as that of a device's allocations

struct Allocation {
  int device;
  char* pages;
  size_t size;  // of the open pages
  bool freed;
};

std::map<void*, Allocation> allocations;

size_t rounded_up(size_t bytes, size_t multiple) { return (bytes + multiple - 1) / multiple * multiple; }

}  // namespace

void set_access(int device, bool open) {
  for (const auto& [address, allocation] : allocations) {
    if (!allocation.freed && allocation.device == device) {
      mprotect(allocation.pages, allocation.size, open ? PROT_READ | PROT_WRITE : PROT_NONE);
    }
  }
}

void forget_freed() {
  for (auto it = allocations.begin(); it != allocations.end();) {
    if (it->second.freed) {
      munmap(it->second.pages, it->second.size + kPage);
      it = allocations.erase(it);
    } else {
      ++it;
    }
  }
}

}  // namespace nexus_shim

using namespace nexus_shim;

// Null where there is none. An allocator may have to wait for the device.
NEXUS_SHIM_CONTROL void* nexus_shim_allocate(int device, size_t bytes) {
  void* address = nullptr;
  called("allocate", [&] {
    if (const cudaError_t error = may_wait("allocate"); error != cudaSuccess) {
      return error;
    }
    const std::lock_guard<std::mutex> lock(one_launch);
    const size_t size = rounded_up(bytes, kPage);
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* pages = mmap(nullptr, size + kPage, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (pages == MAP_FAILED) {
      return cudaErrorMemoryAllocation;
    }
    memset(pages, 0xCC, size);
    mprotect(pages, size + kPage, PROT_NONE);
    address = static_cast<char*>(pages) + size - rounded_up(bytes, kAlignment);
    allocations[address] = {device, static_cast<char*>(pages), size, false};
    return cudaSuccess;
  });
  return address;
}

NEXUS_SHIM_CONTROL int nexus_shim_free(void* address) {
  return called("free", [=] {
    const std::lock_guard<std::mutex> lock(one_launch);
    const auto found = allocations.find(address);
    if (found == allocations.end() || found->second.freed) {
      return cudaErrorInvalidValue;
    }
    found->second.freed = true;
    return cudaSuccess;
  });
}

// How many allocations a device has that are not freed.
NEXUS_SHIM_CONTROL int nexus_shim_allocations(int device) {
  int count = 0;
  for (const auto& [address, allocation] : allocations) {
    count += !allocation.freed && allocation.device == device;
  }
  return count;
}
