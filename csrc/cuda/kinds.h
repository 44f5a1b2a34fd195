// Which kernel updates a tensor. Host and device.
#pragma once

#include <initializer_list>
#include <utility>

#include "../record.h"

namespace nexus::cuda {

// How the state of a tensor is stored, where any of it has fewer bits than the arithmetic.
struct Encoding {
  DType param;
  DType grad;
  DType master_low;
  DType exp_avg;
  DType exp_avg_sq;
};

// Those that have a kernel of their own, without amsgrad. Of all others, and of what does not fill whole
// turns, one kernel finds out at each turn how it is stored.
constexpr Encoding kEncodings[] = {
    {DType::kFloat32, DType::kFloat32, DType::kOther, DType::kBFloat16, DType::kBFloat16},
    {DType::kFloat32, DType::kFloat32, DType::kOther, DType::kInt8, DType::kUInt8},
    {DType::kBFloat16, DType::kBFloat16, DType::kInt16, DType::kFloat32, DType::kFloat32},
    {DType::kBFloat16, DType::kBFloat16, DType::kInt16, DType::kBFloat16, DType::kBFloat16},
    {DType::kBFloat16, DType::kBFloat16, DType::kUInt8, DType::kInt8, DType::kUInt8},
    {DType::kBFloat16, DType::kBFloat16, DType::kOther, DType::kInt8, DType::kUInt8},
};
using EncodingIndices = std::make_index_sequence<sizeof(kEncodings) / sizeof(Encoding)>;

// Kinds: pairs of a parameter's and its gradient's dtype, where nothing has fewer bits; then the encodings.
constexpr int kPlainKinds = kFloatTypes * kFloatTypes;
constexpr int kAnyEncoding = kPlainKinds + static_cast<int>(EncodingIndices::size());
constexpr int kAnyAveraged = kAnyEncoding + 1;  // the same kind, of tensors with an average

NEXUS_FN constexpr int plain_kind(DType param, DType grad) {
  return static_cast<int>(param) * kFloatTypes + static_cast<int>(grad);
}

// All that makes the encoding, in one number.
NEXUS_FN constexpr uint32_t packed(const Encoding& e) {
  uint32_t number = 0;
  for (const DType dtype : {e.param, e.grad, e.master_low, e.exp_avg, e.exp_avg_sq}) {
    number = number << 4 | static_cast<uint32_t>(static_cast<int>(dtype) + 1);
  }
  return number;
}

template <size_t... kIndex>
NEXUS_FN int encoding_of(const TensorRecord& tensor, std::index_sequence<kIndex...>) {
  const uint32_t found = packed({tensor.param_dtype, tensor.grad_dtype, tensor.master_low_dtype,
                                 tensor.exp_avg_dtype, tensor.exp_avg_sq_dtype});
  constexpr uint32_t kKnown[] = {packed(kEncodings[kIndex])...};
  int kind = kAnyEncoding;
  ((kind = found == kKnown[kIndex] ? kPlainKinds + static_cast<int>(kIndex) : kind), ...);
  return kind;
}

NEXUS_FN int kind_of(const TensorRecord& tensor) {
  const bool is_double = tensor.param_dtype == DType::kFloat64;
  const DType arithmetic = is_double ? DType::kFloat64 : DType::kFloat32;
  const bool by_chance = tensor.param_dtype == DType::kBFloat16 && tensor.stochastic_rounding != 0;
  if (tensor.exp_avg_dtype == arithmetic && tensor.exp_avg_sq_dtype == arithmetic &&
      tensor.master_low_dtype == DType::kOther && tensor.narrow_average == 0 && !by_chance) {
    return plain_kind(tensor.param_dtype, tensor.grad_dtype);
  }
  const bool has_own = tensor.max_exp_avg_sq == nullptr && tensor.narrow_average == 0;
  return has_own ? encoding_of(tensor, EncodingIndices()) : kAnyEncoding;
}

// Which kinds the tensors of a table have.
class Kinds {
 public:
  void add(const TensorRecord& tensor) {
    const int kind = kind_of(tensor);
    if (kind != kAnyEncoding) {
      kinds_ |= 1u << kind;
    }
    if (kind >= kPlainKinds) {  // of a known encoding, what does not fill whole turns
      kinds_ |= 1u << (tensor.average == nullptr ? kAnyEncoding : kAnyAveraged);
    }
  }

  // Calls f(kind, is_last) for each; where there is no tensor, for one kind all the same.
  template <class F>
  void for_each(const F& f) const {
    int kind = 0;
    for (uint32_t left = kinds_ == 0 ? 1u : kinds_; left != 0; left >>= 1, ++kind) {
      if (left % 2 != 0) {
        f(kind, left == 1);
      }
    }
  }

 private:
  uint32_t kinds_ = 0;
};
static_assert(kAnyAveraged < 32, "a bit for each kind");

}  // namespace nexus::cuda
