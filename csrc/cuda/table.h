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

// Which codecs the tensors have: pairs of a parameter's and its gradient's.
class CodecPairs {
 public:
  void add(DType param, DType grad) {
    pairs_ |= 1u << (static_cast<int>(param) * kFloatTypes + static_cast<int>(grad));
  }

  // Calls f(param, grad, is_last) for each pair; where there is no tensor, for one pair all the same.
  template <class F>
  void for_each(const F& f) const {
    for (uint32_t left = pairs_ == 0 ? 1u : pairs_, pair = 0; left != 0; left >>= 1, ++pair) {
      if (left % 2 != 0) {
        f(static_cast<DType>(pair / kFloatTypes), static_cast<DType>(pair % kFloatTypes), left == 1);
      }
    }
  }

 private:
  uint32_t pairs_ = 0;
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
  CodecPairs codecs;
};

NEXUS_FN TensorPointers pointers_of(const Table& table, int64_t tensor) {
  return table.tensor_count == 1 ? table.only : table.pointers[tensor];
}

}  // namespace nexus::cuda
