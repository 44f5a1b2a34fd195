// What a tensor is at this moment, read through DLPack's C exchange functions, which torch publishes on its
// tensor type: a stable interface, so that this needs no header of torch, at 20 ns for a Tensor and 50 for a
// Parameter. (A handle of torch's C shim reads a Parameter in 15 ns, but counts as a reference to it, which
// torch.utils.swap_tensors does not allow.)
#pragma once

#include <cstdint>

#include "../record.h"
#include "objects.h"

namespace nexus {

// What a tensor is at this moment. `shape` and `strides` point into the tensor.
struct Description {
  void* data;
  DType dtype;
  int64_t device;  // equal numbers are one device
  int ndim;
  const int64_t* shape;
  const int64_t* strides;
};

class Reader {
 public:
  // `exchange_api`: torch.Tensor.__dlpack_c_exchange_api__. `dtypes`: torch's types, in the order of DType.
  Reader(PyObject* exchange_api, PyObject* dtypes);

  // False where the tensor is none that a kernel could take; no Python error is left behind.
  bool describe(PyObject* tensor, Description& out) const;

  // Its type alone; also of a tensor that has no memory of its own.
  DType dtype(PyObject* tensor) const;

 private:
  int (*exchange_)(void* tensor, void* dltensor);
  Object dtypes_;
  Object dtype_;
};

}  // namespace nexus
