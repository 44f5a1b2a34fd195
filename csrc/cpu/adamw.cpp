// Loops over adamw.h on the CPU. This file is compiled once for each instruction set, as namespace NEXUS_ISA;
// what it includes has internal linkage, so that no set's code is ever linked into another's.
//
// Elements are worked on in blocks that stay in the first-level cache. A stream that is stored in another
// type than the arithmetic's is converted into a small buffer on the way in and back on the way out; the
// others are read and written where they are.
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../half.h"
#include "kernels.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

constexpr int64_t kBlock = 512;

template <class T, class Stored>
void read(const Stored* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<T>(from[i]);
  }
}

template <class T>
void read(const BFloat16* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = static_cast<T>(to_float(from[i]));
  }
}

template <class T>
void read(const Float16* from, T* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (sizeof(T) == sizeof(float)) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) {
    to[i] = static_cast<T>(to_float(from[i]));
  }
}

void write(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    from_float(from[i], to[i]);
  }
}

void write(const float* from, Float16* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
  }
#endif
  for (; i < n; ++i) {
    from_float(from[i], to[i]);
  }
}

// The elements of a stream as T: where they are, or converted into `buffer`.
template <class T>
const T* as(const void* stream, DType dtype, int64_t begin, int64_t n, T* buffer) {
  switch (dtype) {
    case DType::kFloat32:
      if constexpr (sizeof(T) == sizeof(float)) {
        return static_cast<const float*>(stream) + begin;
      }
      read(static_cast<const float*>(stream) + begin, buffer, n);
      return buffer;
    case DType::kFloat64:
      if constexpr (sizeof(T) == sizeof(double)) {
        return static_cast<const double*>(stream) + begin;
      }
      read(static_cast<const double*>(stream) + begin, buffer, n);
      return buffer;
    case DType::kBFloat16:
      read(static_cast<const BFloat16*>(stream) + begin, buffer, n);
      return buffer;
    case DType::kFloat16:
      read(static_cast<const Float16*>(stream) + begin, buffer, n);
      return buffer;
    case DType::kOther:
      break;  // never reaches a list
  }
  return buffer;
}

template <bool kAmsgrad, class T>
void update_block(T* __restrict__ param, const T* __restrict__ grad, T* __restrict__ exp_avg,
                  T* __restrict__ exp_avg_sq, T* __restrict__ max_exp_avg_sq, int64_t n,
                  const Coefficients<T> c) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (kAmsgrad) {
      adamw<true>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], max_exp_avg_sq[i], c);
    } else {
      T unused = 0;
      adamw<false>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], unused, c);
    }
  }
}

template <class T>
void update(const TensorRecord& tensor, const Coefficients<T>& c, int64_t begin, int64_t count) {
  alignas(64) T param_buffer[kBlock];
  alignas(64) T grad_buffer[kBlock];
  const bool in_place = tensor.param_dtype == DType::kFloat32 || tensor.param_dtype == DType::kFloat64;
  const bool whole = in_place && tensor.grad_dtype == tensor.param_dtype;  // nothing to convert: one block
  for (const int64_t end = begin + count; begin < end;) {
    const int64_t n = whole || end - begin < kBlock ? end - begin : kBlock;
    T* param = const_cast<T*>(as(tensor.param, tensor.param_dtype, begin, n, param_buffer));
    const T* grad = as(tensor.grad, tensor.grad_dtype, begin, n, grad_buffer);
    T* exp_avg = static_cast<T*>(tensor.exp_avg) + begin;
    T* exp_avg_sq = static_cast<T*>(tensor.exp_avg_sq) + begin;
    if (tensor.max_exp_avg_sq != nullptr) {
      T* max_exp_avg_sq = static_cast<T*>(tensor.max_exp_avg_sq) + begin;
      update_block<true>(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, n, c);
    } else {
      update_block<false>(param, grad, exp_avg, exp_avg_sq, static_cast<T*>(nullptr), n, c);
    }
    if constexpr (sizeof(T) == sizeof(float)) {
      if (tensor.param_dtype == DType::kBFloat16) {
        write(param, static_cast<BFloat16*>(tensor.param) + begin, n);
      } else if (tensor.param_dtype == DType::kFloat16) {
        write(param, static_cast<Float16*>(tensor.param) + begin, n);
      }
    }
    begin += n;
  }
}

// Sixteen float64 lanes (four vectors of four), added in a fixed order: the same bits whatever the
// instruction set.
constexpr int kLanes = 4;
typedef double Lanes __attribute__((vector_size(kLanes * sizeof(double))));

template <class T>
void add_squares(const T* x, Lanes& sum) {
  typedef T Stored __attribute__((vector_size(kLanes * sizeof(T))));
  Stored values;
  __builtin_memcpy(&values, x, sizeof values);
  const Lanes wide = __builtin_convertvector(values, Lanes);
  sum += wide * wide;
}

struct Squares {
  Lanes sums[4] = {};

  template <class T>
  void add(const T* x, int64_t n) {
    Lanes a = sums[0], b = sums[1], c = sums[2], d = sums[3];
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      add_squares(x + i, a);
      add_squares(x + i + kLanes, b);
      add_squares(x + i + 2 * kLanes, c);
      add_squares(x + i + 3 * kLanes, d);
    }
    for (; i < n; ++i) {
      a[0] += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    sums[0] = a, sums[1] = b, sums[2] = c, sums[3] = d;
  }

  double total() const {
    const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

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
      squares.add(as(grad, dtype, begin, n, buffer), n);
    }
  }
  return squares.total();
}

}  // namespace

#define NEXUS_STRING(x) #x
#define NEXUS_NAME(x) NEXUS_STRING(x)
extern const Kernels kernels;
const Kernels kernels = {NEXUS_NAME(NEXUS_ISA), update<float>, update<double>, sum_of_squares};

}  // namespace nexus::cpu::NEXUS_ISA
