// The update of tensors whose state is stored in fewer bits than the arithmetic has: a kernel for each
// encoding of kinds.h, and one for all that is left.
#include "encoded.h"
#include "kernels.h"

namespace nexus::cuda {
namespace {

// Whether every stream is aligned to 16 bytes.
__device__ bool is_aligned(const Work& work) {
  const TensorRecord& record = work.record;
  const auto addresses =
      reinterpret_cast<uintptr_t>(work.pointers.param) | reinterpret_cast<uintptr_t>(work.pointers.grad) |
      reinterpret_cast<uintptr_t>(record.master_low) | reinterpret_cast<uintptr_t>(record.exp_avg) |
      reinterpret_cast<uintptr_t>(record.exp_avg_sq) | reinterpret_cast<uintptr_t>(record.max_exp_avg_sq) |
      reinterpret_cast<uintptr_t>(record.average);
  return addresses % 16 == 0;
}

// Of a known encoding, 256 elements fill a warp's turns, and 8 share a draw.
__device__ bool has_whole_turns(const Work& work) {
  return is_aligned(work) && work.chunk.count % 256 == 0 && work.record.first % kDrawn == 0;
}

// An encoding that the compiler knows, of a chunk of whole turns.
template <int kIndex>
struct Known {
  static constexpr Encoding kEncoding = kEncodings[kIndex];
  static constexpr DType param_dtype = kEncoding.param;
  static constexpr DType grad_dtype = kEncoding.grad;
  static constexpr DType master_low_dtype = kEncoding.master_low;
  static constexpr DType exp_avg_dtype = kEncoding.exp_avg;
  static constexpr DType exp_avg_sq_dtype = kEncoding.exp_avg_sq;
  static constexpr DType average_dtype = DType::kFloat32;
  static constexpr bool kAverages = true;
  static constexpr bool kHasFloats =
      kEncoding.param == DType::kFloat32 || kEncoding.exp_avg == DType::kFloat32;
  static constexpr int kCount = kHasFloats ? 4 : 8;  // of a turn: at most 16 bytes of any stream
  static constexpr int kTurns = 1;
  static constexpr int kBlocks = 3;
  static constexpr bool kInTurn = true;
  static constexpr bool amsgrad = false;
  static constexpr bool aligned = true;

  __device__ explicit Known(const Work&) {}

  __device__ static bool takes(const Work& work) {
    return kind_of(work.record) == kPlainKinds + kIndex && has_whole_turns(work);
  }

  // How many elements of a turn there are.
  __device__ static int left(int32_t) { return kCount; }
};

// An encoding that the record tells, of a chunk of any size and place; without an average of the parameter.
struct Told {
  static constexpr bool kAverages = false;
  static constexpr int kCount = 4;
  static constexpr int kTurns = 1;
  static constexpr int kBlocks = 2;
  static constexpr bool kInTurn = false;
  DType param_dtype;
  DType grad_dtype;
  DType master_low_dtype;
  DType exp_avg_dtype;
  DType exp_avg_sq_dtype;
  DType average_dtype;
  bool amsgrad;
  bool aligned;

  __device__ explicit Told(const Work& work)
      : param_dtype(work.record.param_dtype),
        grad_dtype(work.record.grad_dtype),
        master_low_dtype(work.record.master_low_dtype),
        exp_avg_dtype(work.record.exp_avg_dtype),
        exp_avg_sq_dtype(work.record.exp_avg_sq_dtype),
        average_dtype(nexus::average_dtype(work.record)),
        amsgrad(work.record.max_exp_avg_sq != nullptr),
        aligned(is_aligned(work)),
        count_(work.chunk.count) {}

  __device__ static bool takes(const Work& work) { return work.record.average == nullptr && is_left(work); }

  __device__ int left(int32_t i) const { return count_ - i; }

 protected:
  // Whether no known encoding takes it.
  __device__ static bool is_left(const Work& work) {
    const int kind = kind_of(work.record);
    return kind == kAnyEncoding || (kind >= kPlainKinds && !has_whole_turns(work));
  }

 private:
  int32_t count_;
};

// The same with an average, which takes more registers.
struct ToldAveraged : Told {
  static constexpr bool kAverages = true;
  static constexpr int kBlocks = 1;
  using Told::Told;

  __device__ static bool takes(const Work& work) { return work.record.average != nullptr && is_left(work); }
};

template <class How>
struct EncodedStreams : How {
  char* param;
  const char* grad;
  char* master_low;
  MomentStream exp_avg;
  MomentStream exp_avg_sq;
  MomentStream max_exp_avg_sq;
  const Table& table;
  char* average;
  bool averages;  // whether there is one
  bool by_chance;
  Chance chance;
  uint64_t first;  // where the chunk begins in the whole tensor

  __device__ EncodedStreams(const Work& work, const Chance& drawn, const Table& t)
      : How(work),
        table(t),
        param(part(work.pointers.param, How::param_dtype, work)),
        grad(part(work.pointers.grad, How::grad_dtype, work)),
        master_low(part(work.record.master_low, How::master_low_dtype, work)),
        exp_avg{part(work.record.exp_avg, How::exp_avg_dtype, work), scales(work.record.exp_avg_scale, work)},
        exp_avg_sq{part(work.record.exp_avg_sq, How::exp_avg_sq_dtype, work),
                   scales(work.record.exp_avg_sq_scale, work)},
        max_exp_avg_sq{part(work.record.max_exp_avg_sq, How::exp_avg_sq_dtype, work),
                       scales(work.record.max_exp_avg_sq_scale, work)},
        average(part(work.record.average, How::average_dtype, work)),
        averages(How::kAverages && work.record.average != nullptr),
        by_chance(work.record.stochastic_rounding != 0),
        chance(drawn),
        first(static_cast<uint64_t>(work.record.first + work.chunk.begin)) {}

  // Whether anything is rounded by chance. It always is where a moment has 8 bits, or the second one 16.
  __device__ bool draws() const {
    return by_chance || bytes_of(How::exp_avg_dtype) == 1 || bytes_of(How::exp_avg_sq_dtype) <= 2 ||
           (averages && How::average_dtype == DType::kBFloat16);
  }

 private:
  // Where a chunk's part of a stream begins.
  template <class Void>
  __device__ static auto part(Void* stream, DType dtype, const Work& work) {
    using Bytes = std::conditional_t<std::is_const_v<Void>, const char, char>;
    return global(static_cast<Bytes*>(stream) + work.chunk.begin * bytes_of(dtype));
  }
  __device__ static float* scales(float* stream, const Work& work) {
    return global(stream + work.chunk.begin / kScaleBlock);
  }
};

template <class How>
struct EncodedElements {
  using Streams = EncodedStreams<How>;
  static constexpr int kCount = How::kCount;

  Words<kCount> param;
  Words<kCount> grad;
  Words<kCount> master_low;
  Moment<kCount> exp_avg;
  Moment<kCount> exp_avg_sq;
  Moment<kCount> max_exp_avg_sq;
  // With the others, unless a turn of it would be more than 16 bytes, and take more registers than there are.
  static constexpr bool kFetchesAverage = kCount == 4;
  Words<kCount> average;

  __device__ void fetch(const Streams& s, int32_t i) {
    const int n = s.left(i);
    param = fetch_words<kCount>(s.param, s.param_dtype, i, n, s.aligned);
    if (s.master_low_dtype != DType::kOther) {
      master_low = fetch_words<kCount>(s.master_low, s.master_low_dtype, i, n, s.aligned);
    }
    if (s.grad_dtype == DType::kFloat64) {
      fetch_doubles(reinterpret_cast<const double*>(s.grad) + i, n);
    } else {
      grad = fetch_words<kCount>(s.grad, s.grad_dtype, i, n, s.aligned);
    }
    exp_avg.fetch(s.exp_avg, s.exp_avg_dtype, i, n, s.aligned);
    exp_avg_sq.fetch(s.exp_avg_sq, s.exp_avg_sq_dtype, i, n, s.aligned);
    if (s.amsgrad) {
      max_exp_avg_sq.fetch(s.max_exp_avg_sq, s.exp_avg_sq_dtype, i, n, s.aligned);
    }
    if (kFetchesAverage && s.averages) {
      average = fetch_words<kCount>(s.average, s.average_dtype, i, n, s.aligned);
    }
  }

  __device__ void update(const Streams& s, int32_t i, const Coefficients<float>& c) {
    float p[kCount], g[kCount], m[kCount], v[kCount], largest_v[kCount] = {};
    decode_param(s, p);
    decode(grad, s.grad_dtype, g);
    exp_avg.decode(s.exp_avg_dtype, m);
    exp_avg_sq.decode(s.exp_avg_sq_dtype, v);
    if (s.amsgrad) {
      max_exp_avg_sq.decode(s.exp_avg_sq_dtype, largest_v);
      adamw_each<true>(p, g, m, v, largest_v, c);
    } else {
      adamw_each<false>(p, g, m, v, largest_v, c);
    }
    if (s.exp_avg_sq_dtype == DType::kUInt8) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        v[k] = root(v[k]);
        largest_v[k] = root(largest_v[k]);
      }
    }
    if (!kFetchesAverage && s.averages) {
      update_average(s.table, i, p);
    }
    Numbers<kCount> drawn = {};
    if (s.draws()) {
      drawn = Numbers<kCount>::template of<How::kInTurn>(s.chance, s.first + static_cast<uint64_t>(i));
    }
    const int n = s.left(i);
    if (kFetchesAverage && s.averages) {
      update_average(s, p, c, drawn);
    }
    encode_param(s, p, drawn);
    exp_avg.encode(s.exp_avg_dtype, m, n, s.by_chance, drawn);
    // To nearest, a second moment in bfloat16 would freeze: what a step adds is less than half a unit.
    const bool by_chance = s.by_chance || s.exp_avg_sq_dtype == DType::kBFloat16;
    exp_avg_sq.encode(s.exp_avg_sq_dtype, v, n, by_chance, drawn);
    if (s.amsgrad) {
      max_exp_avg_sq.encode(s.exp_avg_sq_dtype, largest_v, n, by_chance, drawn);
    }
  }

  __device__ void put(const Streams& s, int32_t i) const {
    const int n = s.left(i);
    put_words(param, s.param, s.param_dtype, i, n, s.aligned);
    if (s.master_low_dtype != DType::kOther) {
      put_words(master_low, s.master_low, s.master_low_dtype, i, n, s.aligned);
    }
    exp_avg.put(s.exp_avg, s.exp_avg_dtype, i, n, s.aligned);
    exp_avg_sq.put(s.exp_avg_sq, s.exp_avg_sq_dtype, i, n, s.aligned);
    if (s.amsgrad) {
      max_exp_avg_sq.put(s.max_exp_avg_sq, s.exp_avg_sq_dtype, i, n, s.aligned);
    }
    if (kFetchesAverage && s.averages) {
      put_words(average, s.average, s.average_dtype, i, n, s.aligned);
    }
  }

 private:
  // As float32, in which they are needed.
  __device__ void fetch_doubles(const double* from, int n) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      grad.set(k, k < n ? static_cast<float>(from[k]) : 0.0f);
    }
  }

  __device__ static void decode(const Words<kCount>& words, DType dtype, float* to) {
    with_float(dtype, [&](auto codec) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        to[k] = decoded(words.template get<decltype(codec)>(k));
      }
    });
  }

  template <bool kAmsgrad>
  __device__ static void adamw_each(float* p, const float* g, float* m, float* v, float* largest_v,
                                    const Coefficients<float>& c) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      adamw<kAmsgrad>(p[k], g[k], m[k], v[k], largest_v[k], c);
    }
  }

  // Where it is. Its place and weight are looked up again: registers are
  // short.
  __device__ static void update_average(const Table& table, int32_t i, const float* p) {
    const Work work(table);
    float* stream = global(static_cast<float*>(work.record.average)) + work.chunk.begin + i;
    const float weight = table.coefficients[work.chunk.tensor].as_float.coefficients.average_weight;
    Pack<float, 4> fours[kCount / 4];
#pragma unroll
    for (int k = 0; k < kCount / 4; ++k) {
      fours[k] = cuda::fetch<4>(stream + 4 * k);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      float& average = fours[k / 4].elements[k % 4];
      average = averaged(average, p[k], weight);
    }
#pragma unroll
    for (int k = 0; k < kCount / 4; ++k) {
      cuda::put(fours[k], stream + 4 * k);
    }
  }

  // In bfloat16, always by chance.
  __device__ void update_average(const Streams& s, const float* p, const Coefficients<float>& c,
                                 const Numbers<kCount>& drawn) {
    float a[kCount];
    decode(average, s.average_dtype, a);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      a[k] = averaged(a[k], p[k], c.average_weight);
      if (s.average_dtype == DType::kBFloat16) {
        BFloat16 out;
        encode(a[k], drawn[k], out);
        average.set(k, out);
      } else {
        average.set(k, a[k]);
      }
    }
  }

  __device__ void decode_param(const Streams& s, float* to) const {
    if (s.master_low_dtype == DType::kOther) {
      return decode(param, s.param_dtype, to);
    }
    with_low(s.master_low_dtype, [&](auto low) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        to[k] = decoded(param.template get<BFloat16>(k), master_low.template get<decltype(low)>(k));
      }
    });
  }

  __device__ void encode_param(const Streams& s, const float* from, const Numbers<kCount>& drawn) {
    const bool has_low = s.master_low_dtype != DType::kOther;
    const bool is_exact = has_low ? s.master_low_dtype == DType::kInt16 : s.param_dtype != DType::kBFloat16;
    const bool by_chance = s.by_chance && !is_exact;
    if (!has_low) {
      with_float(s.param_dtype, [&](auto codec) {
        using Codec = decltype(codec);
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          Codec out;
          if constexpr (std::is_same_v<Codec, BFloat16>) {
            by_chance ? encode(from[k], swapped(drawn[k]), out) : encode(from[k], out);
          } else {
            encode(from[k], out);
          }
          param.set(k, out);
        }
      });
      return;
    }
    with_low(s.master_low_dtype, [&](auto codec) {
      using Low = decltype(codec);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        BFloat16 high;
        Low low;
        if constexpr (std::is_same_v<Low, Low16>) {
          encode(from[k], high, low);
        } else {
          encode(from[k], by_chance ? swapped(drawn[k]) >> 8 : 0x80u, high, low);
        }
        param.set(k, high);
        master_low.set(k, low);
      }
    });
  }
};

template <class How>
__global__ void __launch_bounds__(kThreads, How::kBlocks)
    update_encoded(Table table, StepState state, int, bool advances) {
  if (!has_work(table, state, advances)) {
    return;
  }
  const Work work(table);
  if (work.pointers.grad == nullptr || !How::takes(work)) {
    return;
  }
  count_update(work);
  const FloatRow& row = table.coefficients[work.chunk.tensor].as_float;
  const EncodedStreams<How> streams(work, chance_of(work.record, state.seed, row.step), table);
  const Coefficients<float> c = row.coefficients;
  // The lanes of a warp stay together: blocks of a scale are whole, but for elements that are not there.
  const auto end = static_cast<int32_t>((work.chunk.count + kScaleBlock - 1) / kScaleBlock * kScaleBlock);
  update_range<How::kTurns, EncodedElements<How>>(streams, 0, end, c);
}

template <size_t... kIndex>
UpdateKernel kernel_at(int index, std::index_sequence<kIndex...>) {
  UpdateKernel found =
      kPlainKinds + index == kAnyAveraged ? update_encoded<ToldAveraged> : update_encoded<Told>;
  ((index == static_cast<int>(kIndex) ? void(found = update_encoded<Known<kIndex>>) : void()), ...);
  return found;
}

}  // namespace

UpdateKernel encoded_kernel(int kind) { return kernel_at(kind - kPlainKinds, EncodingIndices()); }

}  // namespace nexus::cuda
