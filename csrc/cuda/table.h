// What one step reads and leaves on one device, in one block of device memory. Passed to kernels by value.
#pragma once

#include "../adamw.h"

namespace nexus::cuda {

// Every kernel's block. The sums of grad_norm.cu depend on it, and on nothing else of a launch.
constexpr int kThreads = 256;

// What moves from step to step. The same fields of a TensorRecord are not read on the device.
struct TensorPointers {
  void* param;
  const void* grad;  // null: no gradient in this step
};

// A tensor's coefficients in the type of its arithmetic: double for float64 parameters.
union CoefficientRow {
  Coefficients<float> as_float;
  Coefficients<double> as_double;
};

struct Header {
  int32_t skip;            // this step changes nothing
  uint32_t finished_sums;  // blocks of the norm that are done
};

struct Table {
  const TensorRecord* tensors;
  const TensorPointers* pointers;
  const Group* groups;
  int64_t tensor_count;
  int64_t group_count;
  int64_t chunk_count;
  Chunk* chunks;                 // of every tensor at least one, which is empty if the tensor is
  Row* rows;                     // one a group
  CoefficientRow* coefficients;  // one a tensor
  double* partial_sums;          // one a chunk
  Header* header;
  DType param_dtype;  // of all tensors, or kOther, and so grad_dtype
  DType grad_dtype;
};

}  // namespace nexus::cuda
