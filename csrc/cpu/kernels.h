// The two loops over elements, in the best of the instruction sets that they were compiled for.
#pragma once

#include "../adamw.h"
#include "../chance.h"

// Before a loop whose iterations touch no memory of one another: it is vectorised without a check.
#ifdef __clang__
#define NEXUS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define NEXUS_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace nexus::cpu {

struct Kernels {
  const char* instruction_set;
  // Updates elements [begin, begin + count) of a tensor with float32 (or float64) arithmetic.
  void (*update_float)(const TensorRecord&, const Chance&, const Coefficients<float>&, int64_t begin,
                       int64_t count);
  void (*update_double)(const TensorRecord&, const Chance&, const Coefficients<double>&, int64_t begin,
                        int64_t count);
  // The sum of squares of elements [begin, begin + count) of a gradient, in float64.
  double (*sum_of_squares)(const void* grad, DType dtype, int64_t begin, int64_t count);
};

// The best set that this processor has; with a name, that one, or null if it is not to be had.
const Kernels* kernels(const char* instruction_set = nullptr);

}  // namespace nexus::cpu
