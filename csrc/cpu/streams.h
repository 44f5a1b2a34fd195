// A block of every stream of a tensor: decoded into buffers that stay in the first-level cache, and encoded
// again once it is updated. A stream that is stored in the type of the arithmetic is read and written where
// it is. Included once for each instruction set.
#pragma once

#include <type_traits>

#include "scaled.h"

namespace nexus::cpu::NEXUS_ISA {
namespace {

template <class Codec, class T>
constexpr bool kInPlace = std::is_same_v<Codec, T>;

// The n elements of a stream from `begin` on, as T: where they are, or decoded into `buffer`.
template <class T>
const T* decode(const void* stream, DType dtype, int64_t begin, int64_t n, T* buffer) {
  return with_codec(dtype, [=](auto codec) -> const T* {
    using Codec = decltype(codec);
    const Codec* from = static_cast<const Codec*>(stream) + begin;
    if constexpr (kInPlace<Codec, T>) {
      return from;
    } else {
      load(from, buffer, n);
      return buffer;
    }
  });
}

// And back, unless they were updated where they are.
template <class T>
void encode(const T* from, void* stream, DType dtype, int64_t begin, int64_t n) {
  with_codec(dtype, [=](auto codec) {
    using Codec = decltype(codec);
    if constexpr (std::is_same_v<typename ArithmeticOf<Codec>::type, T> && !kInPlace<Codec, T>) {
      store(from, static_cast<Codec*>(stream) + begin, n);
    }
  });
}

// Where a moment is.
struct Moment {
  void* codes;
  DType dtype;
  float* scales;
  bool by_chance;
};

template <class Codec>
Codec* codes(const Moment& moment, int64_t begin) {
  return static_cast<Codec*>(moment.codes) + begin;
}

template <class T>
T* decode(const Moment& moment, int64_t begin, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<T, float>) {
    const float* scales = moment.scales + begin / kScaleBlock;
    switch (moment.dtype) {
      case DType::kBFloat16:
        load(codes<const BFloat16>(moment, begin), buffer, n);
        return buffer;
      case DType::kInt8:
        decode_scaled(codes<const Squared8>(moment, begin), scales, buffer, n);
        return buffer;
      case DType::kUInt8:
        decode_scaled(codes<const Fourth8>(moment, begin), scales, buffer, n);
        return buffer;
      default:
        break;
    }
  }
  return codes<T>(moment, begin);
}

template <bool kIsParam>
void store_by_chance(const float* from, BFloat16* to, const uint16_t* numbers, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    encode(from[i], kIsParam ? swapped(numbers[i]) : numbers[i], to[i]);
  }
}

// Of a moment that is stored as Fourth8, `from` has the roots.
void encode(const float* from, const Moment& moment, Numbers& numbers, int64_t begin, int64_t n) {
  float* scales = moment.scales + begin / kScaleBlock;
  switch (moment.dtype) {
    case DType::kBFloat16:
      if (moment.by_chance) {
        store_by_chance<false>(from, codes<BFloat16>(moment, begin), numbers.drawn(), n);
      } else {
        store(from, codes<BFloat16>(moment, begin), n);
      }
      break;
    case DType::kInt8:
      encode_scaled(from, codes<Squared8>(moment, begin), scales, numbers.drawn(), n);
      break;
    case DType::kUInt8:
      encode_scaled(from, codes<Fourth8>(moment, begin), scales, numbers.drawn(), n);
      break;
    default:
      break;
  }
}

// The parameter that has the low bits of its master weight in a stream of their own.
template <class Low>
void decode_master(const BFloat16* high, const Low* low, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[i] = decoded(high[i], low[i]);
  }
}

const float* decode_master(const TensorRecord& tensor, int64_t begin, int64_t n, float* buffer) {
  const BFloat16* high = static_cast<const BFloat16*>(tensor.param) + begin;
  if (tensor.master_low_dtype == DType::kInt16) {
    decode_master(high, static_cast<const Low16*>(tensor.master_low) + begin, buffer, n);
  } else {
    decode_master(high, static_cast<const Low8*>(tensor.master_low) + begin, buffer, n);
  }
  return buffer;
}

void encode_master(const float* from, const TensorRecord& tensor, Numbers& numbers, int64_t begin,
                   int64_t n) {
  BFloat16* high = static_cast<BFloat16*>(tensor.param) + begin;
  if (tensor.master_low_dtype == DType::kInt16) {
    Low16* low = static_cast<Low16*>(tensor.master_low) + begin;
    for (int64_t i = 0; i < n; ++i) {
      encode(from[i], high[i], low[i]);
    }
    return;
  }
  Low8* low = static_cast<Low8*>(tensor.master_low) + begin;
  if (tensor.stochastic_rounding != 0) {
    const uint16_t* drawn = numbers.drawn();
    for (int64_t i = 0; i < n; ++i) {
      encode(from[i], swapped(drawn[i]) >> 8, high[i], low[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      encode(from[i], 0x80u, high[i], low[i]);
    }
  }
}

template <class T>
bool is_arithmetic(DType dtype) {
  return dtype == (std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32);
}

// Whether the moments are as they are computed, and the parameter is rounded to nearest.
template <class T>
bool is_plain(const TensorRecord& tensor) {
  const bool by_chance = tensor.stochastic_rounding != 0 && tensor.param_dtype == DType::kBFloat16;
  return is_arithmetic<T>(tensor.exp_avg_dtype) && is_arithmetic<T>(tensor.exp_avg_sq_dtype) &&
         tensor.master_low_dtype == DType::kOther && tensor.narrow_average == 0 && !by_chance;
}

template <class T>
class Streams {
 public:
  Streams(const TensorRecord& tensor, const Chance& chance)
      : tensor_(tensor),
        chance_(chance),
        by_chance_(tensor.stochastic_rounding != 0),
        exp_avg_{tensor.exp_avg, tensor.exp_avg_dtype, tensor.exp_avg_scale, by_chance_},
        exp_avg_sq_(second_moment(tensor.exp_avg_sq, tensor.exp_avg_sq_scale)),
        max_exp_avg_sq_(second_moment(tensor.max_exp_avg_sq, tensor.max_exp_avg_sq_scale)),
        average_{tensor.average, average_dtype(tensor), nullptr, true} {}

  T* param;
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;  // null without amsgrad
  T* average;         // null without one

  void decode(int64_t begin, int64_t n) {
    param = const_cast<T*>(decode_param(begin, n));
    grad = NEXUS_ISA::decode(tensor_.grad, tensor_.grad_dtype, begin, n, grad_buffer_);
    exp_avg = NEXUS_ISA::decode(exp_avg_, begin, n, exp_avg_buffer_);
    exp_avg_sq = NEXUS_ISA::decode(exp_avg_sq_, begin, n, exp_avg_sq_buffer_);
    max_exp_avg_sq = tensor_.max_exp_avg_sq == nullptr
                         ? nullptr
                         : NEXUS_ISA::decode(max_exp_avg_sq_, begin, n, max_exp_avg_sq_buffer_);
    average = tensor_.average == nullptr ? nullptr : NEXUS_ISA::decode(average_, begin, n, average_buffer_);
  }

  // Lets memory bring the elements that come next while these are worked on in the first-level cache.
  void fetch(int64_t begin, int64_t n) const {
    fetch(tensor_.param, tensor_.param_dtype, begin, n);
    fetch(tensor_.grad, tensor_.grad_dtype, begin, n);
    fetch(tensor_.exp_avg, tensor_.exp_avg_dtype, begin, n);
    fetch(tensor_.exp_avg_sq, tensor_.exp_avg_sq_dtype, begin, n);
    if (tensor_.master_low != nullptr) {
      fetch(tensor_.master_low, tensor_.master_low_dtype, begin, n);
    }
    if (tensor_.average != nullptr) {
      fetch(tensor_.average, average_dtype(tensor_), begin, n);
    }
  }

  void encode(int64_t begin, int64_t n) const {
    if constexpr (std::is_same_v<T, float>) {
      Numbers numbers(chance_, tensor_.first + begin, n);
      encode_param(numbers, begin, n);
      NEXUS_ISA::encode(exp_avg, exp_avg_, numbers, begin, n);
      NEXUS_ISA::encode(exp_avg_sq, exp_avg_sq_, numbers, begin, n);
      if (max_exp_avg_sq != nullptr) {
        NEXUS_ISA::encode(max_exp_avg_sq, max_exp_avg_sq_, numbers, begin, n);
      }
      if (average != nullptr) {
        NEXUS_ISA::encode(average, average_, numbers, begin, n);
      }
    }
  }

 private:
  static void fetch(const void* stream, DType dtype, int64_t begin, int64_t n) {
    const auto item = static_cast<int64_t>(item_size(dtype));
    const char* from = static_cast<const char*>(stream) + begin * item;
    for (int64_t line = 0; line < n * item; line += 64) {
      __builtin_prefetch(from + line);
    }
  }

  // To nearest, a second moment in bfloat16 would freeze: what a step adds is less than half a unit.
  Moment second_moment(void* codes, float* scales) const {
    const DType dtype = tensor_.exp_avg_sq_dtype;
    return {codes, dtype, scales, by_chance_ || dtype == DType::kBFloat16};
  }

  const T* decode_param(int64_t begin, int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
      if (tensor_.master_low_dtype != DType::kOther) {
        return decode_master(tensor_, begin, n, param_buffer_);
      }
    }
    return NEXUS_ISA::decode(tensor_.param, tensor_.param_dtype, begin, n, param_buffer_);
  }

  void encode_param(Numbers& numbers, int64_t begin, int64_t n) const {
    if (tensor_.master_low_dtype != DType::kOther) {
      encode_master(param, tensor_, numbers, begin, n);
    } else if (tensor_.param_dtype == DType::kBFloat16 && by_chance_) {
      store_by_chance<true>(param, static_cast<BFloat16*>(tensor_.param) + begin, numbers.drawn(), n);
    } else {
      NEXUS_ISA::encode(param, tensor_.param, tensor_.param_dtype, begin, n);
    }
  }

  const TensorRecord& tensor_;
  const Chance& chance_;
  bool by_chance_;
  Moment exp_avg_;
  Moment exp_avg_sq_;
  Moment max_exp_avg_sq_;
  Moment average_;
  // Longer than a block: were they 4096 bytes apart, the processor would take loads from one for loads of
  // what it is storing to another.
  static constexpr int64_t kBuffer = kBlock + 48;
  alignas(64) T param_buffer_[kBuffer];
  alignas(64) T grad_buffer_[kBuffer];
  alignas(64) T exp_avg_buffer_[kBuffer];
  alignas(64) T exp_avg_sq_buffer_[kBuffer];
  alignas(64) T max_exp_avg_sq_buffer_[kBuffer];
  alignas(64) T average_buffer_[kBuffer];
};

}  // namespace
}  // namespace nexus::cpu::NEXUS_ISA
