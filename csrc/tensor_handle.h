// A handle on a torch tensor that follows it wherever it goes, and reads what it is in a few nanoseconds.
//
// It is made of the C functions that torch exports with a stable binary interface for compiled models
// (torch/csrc/inductor/aoti_torch/c/shim.h). They are looked up by name at run time, so that this needs no
// header of torch; where there are none, a watch reads the Python object instead (tensor_watch.h).
#pragma once

#include <cstdint>
#include <utility>

namespace nexus {

struct TensorShim {
  int32_t (*data_ptr)(void* handle, void** out);
  int32_t (*sizes)(void* handle, int64_t** out);
  int32_t (*strides)(void* handle, int64_t** out);
  int32_t (*dim)(void* handle, int64_t* out);
  int32_t (*dtype)(void* handle, int32_t* out);
  int32_t (*device_type)(void* handle, int32_t* out);
  int32_t (*delete_handle)(void* handle);
};

// What a handle's tensor is at this moment; `sizes` and `strides` point into it.
struct HandleReading {
  void* data;
  int64_t* sizes;
  int64_t* strides;
  int64_t dim;
  int32_t dtype;  // torch's own number: only to be compared
};

class TensorHandle {
 public:
  TensorHandle() = default;
  TensorHandle(const TensorShim* shim, void* owned) : shim_(shim), handle_(owned) {}
  TensorHandle(TensorHandle&& other) noexcept
      : shim_(other.shim_), handle_(std::exchange(other.handle_, nullptr)) {}
  TensorHandle& operator=(TensorHandle&& other) noexcept {
    std::swap(shim_, other.shim_);
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~TensorHandle() {
    if (handle_ != nullptr) {
      shim_->delete_handle(handle_);
    }
  }

  explicit operator bool() const { return handle_ != nullptr; }

  // False where torch reports an error.
  bool read(HandleReading& out) const {
    return shim_->data_ptr(handle_, &out.data) == 0 && shim_->sizes(handle_, &out.sizes) == 0 &&
           shim_->strides(handle_, &out.strides) == 0 && shim_->dim(handle_, &out.dim) == 0 &&
           shim_->dtype(handle_, &out.dtype) == 0;
  }

  bool on_cpu() const {
    int32_t type = -1;
    return shim_->device_type(handle_, &type) == 0 && type == 0;
  }

 private:
  const TensorShim* shim_ = nullptr;
  void* handle_ = nullptr;
};

}  // namespace nexus
