#include "device_table.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "launch.h"

namespace nexus::cuda {
namespace {

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// Uploads the stretches of `now`, each as long as one launch can take, that differ from `written`.
template <class T>
void write_changes(const T* device, std::vector<T>& written, const std::vector<T>& now, cudaStream_t stream) {
  constexpr size_t kStretch = kUploadBytes / sizeof(T);
  const bool all = written.size() != now.size();
  written.resize(now.size());
  for (size_t begin = 0; begin < now.size(); begin += kStretch) {
    const size_t bytes = std::min(kStretch, now.size() - begin) * sizeof(T);
    if (all || memcmp(&written[begin], &now[begin], bytes) != 0) {
      upload(const_cast<T*>(device + begin), &now[begin], bytes, stream);
      memcpy(&written[begin], &now[begin], bytes);
    }
  }
}

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != device) {
    check(cudaSetDevice(device), "changing the current device");
    previous_ = current;
  }
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) {
    cudaSetDevice(previous_);
  }
}

void DeviceTable::lay_out(const Contents& now, cudaStream_t stream) {
  size_t bytes = 0;
  const auto place = [&](auto*& section, size_t count) {
    const size_t offset = bytes;
    bytes += (count * sizeof(*section) + 255) / 256 * 256;
    char* const start = static_cast<char*>(memory_.get());
    section = reinterpret_cast<std::remove_reference_t<decltype(section)>>(start + offset);
  };
  const auto place_all = [&] {
    bytes = 0;
    place(table_.header, 1);
    place(table_.tensors, now.tensors.size());
    place(table_.pointers, now.tensors.size());
    place(table_.coefficients, now.tensors.size());
    place(table_.groups, now.groups.size());
    place(table_.rows, now.groups.size());
    place(table_.chunks, static_cast<size_t>(now.chunk_count));
    place(table_.partial_sums, static_cast<size_t>(std::max<int64_t>(now.chunk_count, 1)));
  };
  place_all();
  // A table is written and read on the stream that its memory was allocated for, so that what comes to have
  // this memory next waits, on the device, for the last step that reads it. Steps on another stream get
  // another table.
  if (bytes > capacity_ || stream != stream_) {
    memory_ = allocate_(device_, bytes, stream);
    capacity_ = bytes;
    stream_ = stream;
    place_all();
  }
  table_.tensor_count = static_cast<int64_t>(now.tensors.size());
  table_.group_count = static_cast<int64_t>(now.groups.size());
  table_.chunk_count = now.chunk_count;
  table_.kinds = now.kinds;
  table_.keeps_products = now.keeps_products;
}

void DeviceTable::write(const Contents& now, cudaStream_t stream) {
  const bool everything = !complete_ || stream != stream_;
  complete_ = false;
  if (everything) {
    lay_out(now, stream);
    written_ = {};
    const Header header = {};
    upload(table_.header, &header, sizeof header, stream);
    write_changes(table_.tensors, written_.tensors, now.tensors, stream);
    divide(table_, stream);
  }
  if (now.pointers.size() == 1) {
    table_.only = now.pointers[0];
    written_.pointers = now.pointers;
  } else {
    write_changes(table_.pointers, written_.pointers, now.pointers, stream);
  }
  write_changes(table_.groups, written_.groups, now.groups, stream);
  written_.measures_norm = now.measures_norm;
  complete_ = true;
}

void DeviceTable::write_groups(const Contents& now, cudaStream_t stream) {
  if (!complete_ || now.groups.size() != written_.groups.size()) {
    return;
  }
  if (now.measures_norm && !written_.measures_norm) {
    throw std::runtime_error(
        "a graph holds a step that does not measure the gradient norm, so clipping cannot be switched on in "
        "it; capture it with max_grad_norm=math.inf");
  }
  complete_ = false;
  write_changes(table_.groups, written_.groups, now.groups, stream);
  complete_ = true;
}

bool DeviceTable::holds(const Contents& now) const {
  return complete_ && written_.measures_norm == now.measures_norm && same(written_.tensors, now.tensors) &&
         same(written_.pointers, now.pointers) && same(written_.groups, now.groups);
}

}  // namespace nexus::cuda
