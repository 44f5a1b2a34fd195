// Device memory from an allocator in Python, torch's, for kernels that know of neither.
#pragma once

#include <pybind11/pybind11.h>

#include <mutex>
#include <utility>
#include <vector>

#include "../cuda/device_table.h"
#include "binding.h"

namespace nexus {

// Blocks that nobody holds any more. Any thread may have let go of them: also CUDA's own, when it destroys a
// graph, which must call neither CUDA nor Python. So they wait here for one that may.
class AbandonedBlocks {
 public:
  struct Block {
    void* address;
    PyObject* release;  // a reference
  };

  void add(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back(block);
  }

  // To be called with the GIL.
  void give_back() {
    std::vector<Block> blocks;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      blocks.swap(blocks_);
    }
    for (const Block& block : blocks) {
      try {
        py::reinterpret_steal<py::object>(block.release)(reinterpret_cast<Address>(block.address));
      } catch (py::error_already_set& error) {
        error.discard_as_unraisable("giving back device memory");
      }
    }
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
};

// Never destroyed: CUDA may destroy graphs as late as the end of the process.
inline AbandonedBlocks& abandoned_blocks() {
  static auto& blocks = *new AbandonedBlocks;
  return blocks;
}

// The memory of `allocate(device, bytes, stream)`, an address, which `release(address)` takes back. An error
// of Python passes through the caller, and arrives in Python as it was.
inline cuda::Allocate allocate_with(py::object allocate, py::object release) {
  return [allocate = std::move(allocate), release = std::move(release)](int device, size_t bytes,
                                                                        cudaStream_t stream) {
    const py::gil_scoped_acquire gil;
    abandoned_blocks().give_back();
    const py::object address = allocate(device, bytes, reinterpret_cast<Address>(stream));
    const auto abandon = [release = release.inc_ref().ptr()](void* memory) {
      abandoned_blocks().add({memory, release});
    };
    return cuda::Memory(at<void>(address.cast<Address>()), abandon);
  };
}

}  // namespace nexus
