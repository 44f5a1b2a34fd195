#include "reader.h"

#include <stdexcept>

namespace nexus {
namespace {

// The parts of dlpack.h (version 1.3) that are read here. Its layout is fixed within a major version.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t type_code;
  uint8_t type_bits;
  uint16_t type_lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLPackExchangeAPI {
  uint32_t major;
  uint32_t minor;
  void* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* py_object, void* dltensor);
  void* current_work_stream;
};

DType dtype_of(uint8_t code, uint8_t bits, uint16_t lanes) {
  for (int i = 0; i < kDTypes; ++i) {
    if (kStoredTypes[i].dlpack_code == code && kStoredTypes[i].bits == bits && lanes == 1) {
      return static_cast<DType>(i);
    }
  }
  return DType::kOther;
}

}  // namespace

Reader::Reader(PyObject* exchange_api, PyObject* dtypes) : dtypes_(dtypes), dtype_(interned("dtype")) {
  auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api"));
  PyErr_Clear();
  if (api == nullptr || api->major != 1) {
    throw std::invalid_argument("torch.Tensor.__dlpack_c_exchange_api__ is not that of DLPack 1");
  }
  exchange_ = api->dltensor_from_py_object;
}

bool Reader::describe(PyObject* tensor, Description& out) const {
  DLTensor now;
  if (exchange_(tensor, &now) != 0) {
    PyErr_Clear();  // a sparse tensor, for one
    return false;
  }
  if (now.strides == nullptr && now.ndim > 0) {
    return false;
  }
  out.data = static_cast<char*>(now.data) + now.byte_offset;
  out.device = (static_cast<int64_t>(now.device_type) << 32) + now.device_id;
  out.ndim = now.ndim;
  out.shape = now.shape;
  out.strides = now.strides;
  out.dtype = dtype_of(now.type_code, now.type_bits, now.type_lanes);
  return true;
}

DType Reader::dtype(PyObject* tensor) const {
  const Object dtype = Object::own(PyObject_GetAttr(tensor, dtype_.get()));
  PyErr_Clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dtypes_.get()); ++i) {
    if (PyTuple_GET_ITEM(dtypes_.get(), i) == dtype.get()) {
      return static_cast<DType>(i);
    }
  }
  return DType::kOther;
}

}  // namespace nexus
