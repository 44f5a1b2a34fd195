#include "tensor_reader.h"

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

constexpr uint8_t kFloat = 2;
constexpr uint8_t kBFloat = 4;

DType dtype_of(uint8_t code, uint8_t bits, uint16_t lanes) {
  if (code == kFloat && lanes == 1) {
    return bits == 32   ? DType::kFloat32
           : bits == 64 ? DType::kFloat64
           : bits == 16 ? DType::kFloat16
                        : DType::kOther;
  }
  return code == kBFloat && bits == 16 && lanes == 1 ? DType::kBFloat16 : DType::kOther;
}

}  // namespace

TensorReader::TensorReader(PyObject* exchange_api, PyObject* dtypes)
    : dtypes_(dtypes),
      data_ptr_(interned("data_ptr")),
      dtype_(interned("dtype")),
      is_cpu_(interned("is_cpu")),
      get_device_(interned("get_device")),
      shape_(interned("shape")),
      stride_(interned("stride")) {
  if (PyCapsule_CheckExact(exchange_api)) {
    auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange_api, "dlpack_exchange_api"));
    if (api == nullptr) {
      PyErr_Clear();
    } else if (api->major == 1) {
      exchange_ = api->dltensor_from_py_object;
    }
  }
}

bool TensorReader::describe(PyObject* tensor, Description& out) {
  if (exchange_ == nullptr) {
    return describe_by_attributes(tensor, out);
  }
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

bool TensorReader::read_tuple(Object tuple, std::vector<int64_t>& out) {
  if (tuple.get() == nullptr || !PyTuple_Check(tuple.get())) {
    return false;
  }
  out.clear();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple.get()); ++i) {
    out.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.get(), i)));
  }
  return PyErr_Occurred() == nullptr;
}

bool TensorReader::describe_by_attributes(PyObject* tensor, Description& out) {
  const Object data = Object::own(PyObject_CallMethodNoArgs(tensor, data_ptr_.get()));
  const Object dtype = Object::own(PyObject_GetAttr(tensor, dtype_.get()));
  const Object is_cpu = Object::own(PyObject_GetAttr(tensor, is_cpu_.get()));
  const Object device = Object::own(PyObject_CallMethodNoArgs(tensor, get_device_.get()));
  const bool read =
      data.get() != nullptr && dtype.get() != nullptr && is_cpu.get() != nullptr && device.get() != nullptr &&
      read_tuple(Object::own(PyObject_GetAttr(tensor, shape_.get())), shape_scratch_) &&
      read_tuple(Object::own(PyObject_CallMethodNoArgs(tensor, stride_.get())), stride_scratch_);
  if (!read) {
    PyErr_Clear();
    return false;
  }
  out.data = PyLong_AsVoidPtr(data.get());
  // get_device() is -1 for the CPU, but also for a device without memory.
  out.device = is_cpu.get() == Py_True ? INT64_MIN : PyLong_AsLongLong(device.get());
  out.ndim = static_cast<int>(shape_scratch_.size());
  out.shape = shape_scratch_.data();
  out.strides = stride_scratch_.data();
  out.dtype = index_of(dtype.get());
  return true;
}

DType TensorReader::dtype(PyObject* tensor) const {
  const Object dtype = Object::own(PyObject_GetAttr(tensor, dtype_.get()));
  if (dtype.get() == nullptr) {
    PyErr_Clear();
  }
  return index_of(dtype.get());
}

DType TensorReader::index_of(PyObject* dtype) const {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(dtypes_.get()); ++i) {
    if (PyTuple_GET_ITEM(dtypes_.get(), i) == dtype) {
      return static_cast<DType>(i);
    }
  }
  return DType::kOther;
}

}  // namespace nexus
