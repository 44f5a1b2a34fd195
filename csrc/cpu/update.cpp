// The loops over elements on the CPU. This file is compiled once for each instruction set, as namespace
// NEXUS_ISA; what it includes has internal linkage, so that no set's code is ever linked into another's.
#include "kernels.h"
#include "one_pass.h"
#include "squares.h"
#include "streams.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

// `kLeavesRoots`: the second moments' roots are in their place, to be encoded in 8 bits.
template <bool kAmsgrad, bool kAveraged, bool kLeavesRoots, class T>
void update_each(T* __restrict__ param, const T* __restrict__ grad, T* __restrict__ exp_avg,
                 T* __restrict__ exp_avg_sq, T* __restrict__ max_exp_avg_sq, T* __restrict__ average,
                 int64_t n, const Coefficients<T> c) {
  NEXUS_INDEPENDENT
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kAmsgrad) {
      adamw<true>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], max_exp_avg_sq[i], c);
    } else {
      T unused = 0;
      adamw<false>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], unused, c);
    }
    if constexpr (kAveraged) {
      average[i] = averaged(average[i], param[i], c.average_weight);
    }
    if constexpr (kLeavesRoots) {
      exp_avg_sq[i] = root(exp_avg_sq[i]);
      if constexpr (kAmsgrad) {
        max_exp_avg_sq[i] = root(max_exp_avg_sq[i]);
      }
    }
  }
}

template <bool kLeavesRoots, class T>
void update_block(T* param, const T* grad, T* exp_avg, T* exp_avg_sq, T* max_exp_avg_sq, T* average,
                  int64_t n, const Coefficients<T>& c) {
  const auto update = [=, &c](auto amsgrad, auto is_averaged) {
    update_each<amsgrad.value, is_averaged.value, kLeavesRoots>(param, grad, exp_avg, exp_avg_sq,
                                                                max_exp_avg_sq, average, n, c);
  };
  const auto update_averaged = [=](auto is_averaged) {
    max_exp_avg_sq != nullptr ? update(std::true_type(), is_averaged)
                              : update(std::false_type(), is_averaged);
  };
  average != nullptr ? update_averaged(std::true_type()) : update_averaged(std::false_type());
}

// Where the moments are as they are computed, and the parameter is rounded to nearest. By way of Streams,
// half precision took 7-10% longer (2M elements in the cache, AMD EPYC), and a tensor of 64 elements 10 ns.
template <class T>
void update_plain(const TensorRecord& tensor, const Coefficients<T>& c, int64_t begin, int64_t count) {
  alignas(64) T param_buffer[kBlock];
  alignas(64) T grad_buffer[kBlock];
  const bool whole = is_arithmetic<T>(tensor.param_dtype) && is_arithmetic<T>(tensor.grad_dtype);
  for (const int64_t end = begin + count; begin < end;) {
    // Where nothing is to be decoded, all of it is one block.
    const int64_t n = whole || end - begin < kBlock ? end - begin : kBlock;
    const auto moment = [begin](void* stream) { return static_cast<T*>(stream) + begin; };
    T* param = const_cast<T*>(decode(tensor.param, tensor.param_dtype, begin, n, param_buffer));
    const T* grad = decode(tensor.grad, tensor.grad_dtype, begin, n, grad_buffer);
    T* max_exp_avg_sq = tensor.max_exp_avg_sq == nullptr ? nullptr : moment(tensor.max_exp_avg_sq);
    T* average = tensor.average == nullptr ? nullptr : moment(tensor.average);
    update_block<false>(param, grad, moment(tensor.exp_avg), moment(tensor.exp_avg_sq), max_exp_avg_sq,
                        average, n, c);
    encode(param, tensor.param, tensor.param_dtype, begin, n);
    begin += n;
  }
}

template <class T>
void update(const TensorRecord& tensor, const Chance& chance, const Coefficients<T>& c, int64_t begin,
            int64_t count) {
  if (is_plain<T>(tensor)) {
    update_plain(tensor, c, begin, count);
    return;
  }
  if constexpr (std::is_same_v<T, float>) {
    if (update_in_one_pass(tensor, chance, c, begin, count)) {
      return;
    }
  }
  const bool leaves_roots = tensor.exp_avg_sq_dtype == DType::kUInt8;
  const auto apply = leaves_roots ? update_block<true, T> : update_block<false, T>;
  Streams<T> s(tensor, chance);
  for (const int64_t end = begin + count; begin < end;) {
    const int64_t n = end - begin < kBlock ? end - begin : kBlock;
    s.decode(begin, n);
    s.fetch(begin + n, end - begin - n < kBlock ? end - begin - n : kBlock);
    apply(s.param, s.grad, s.exp_avg, s.exp_avg_sq, s.max_exp_avg_sq, s.average, n, c);
    s.encode(begin, n);
    begin += n;
  }
}

double sum_of_squares(const void* grad, DType dtype, int64_t begin, int64_t count) {
  Squares squares;
  if (dtype == DType::kFloat64) {
    squares.add(static_cast<const double*>(grad) + begin, count);
  } else if (dtype == DType::kFloat32) {
    squares.add(static_cast<const float*>(grad) + begin, count);
  } else {
    alignas(64) float buffer[kBlock];
    for (const int64_t end = begin + count; begin < end; begin += kBlock) {
      const int64_t n = end - begin < kBlock ? end - begin : kBlock;
      squares.add(decode(grad, dtype, begin, n, buffer), n);
    }
  }
  return squares.total();
}

}  // namespace

#ifdef NEXUS_NEON  // which every such processor has
constexpr const char* kName = "neon";
#else
#define NEXUS_STRING(x) #x
#define NEXUS_NAME(x) NEXUS_STRING(x)
constexpr const char* kName = NEXUS_NAME(NEXUS_ISA);
#endif
extern const Kernels kernels;
const Kernels kernels = {kName, update<float>, update<double>, sum_of_squares};

}  // namespace nexus::cpu::NEXUS_ISA
