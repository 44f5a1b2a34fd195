// What one step reads and leaves on one device, in one block of device memory. Passed to kernels by value.
#pragma once

#include "../adamw.h"
#include "kinds.h"

namespace nexus::cuda {

// Every kernel's block. The sums of grad_norm.cu depend on it, and on nothing else of a launch.
constexpr int kThreads = 256;

// What moves from step to step. The same fields of a TensorRecord are not read on the device.
struct TensorPointers {
  void* param;
  const void* grad;  // null: no gradient in this step
};

// A tensor's coefficients in the type of its arithmetic: double for float64 parameters.
struct FloatRow {
  Coefficients<float> coefficients;
  int64_t step;  // the tensor's count of updates, this one included: record.step is counted meanwhile
};
struct CoefficientRow {
  union {
    FloatRow as_float;
    Coefficients<double> as_double;
  };
  BetaProducts products;  // what the update leaves in the tensor's record, if it keeps them
};

struct Header {
  int32_t skip;            // this step changes nothing
  uint32_t finished_sums;  // blocks of the norm that are done
};

struct Table {
  const TensorRecord* tensors;
  const TensorPointers* pointers;
  TensorPointers only;  // of the one tensor where there are no more: no launch has to write them
  const Group* groups;
  int64_t tensor_count;
  int64_t group_count;
  int64_t chunk_count;
  Chunk* chunks;                 // of every tensor at least one, which is empty if the tensor is
  Row* rows;                     // one a group
  CoefficientRow* coefficients;  // one a tensor
  double* partial_sums;          // one a chunk
  Header* header;
  Kinds kinds;
  bool keeps_products;  // whether some tensor has products of betas
};

NEXUS_FN TensorPointers pointers_of(const Table& table, int64_t tensor) {
  return table.tensor_count == 1 ? table.only : table.pointers[tensor];
}

}  // namespace nexus::cuda
