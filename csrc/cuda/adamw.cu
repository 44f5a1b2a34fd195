// The update of every tensor in one launch: a block for each chunk.
#include "kernels.h"
#include "launch.h"
#include "streams.h"

namespace nexus::cuda {
namespace {

// Where all tensors share their types: at most 64 registers a thread, so that 32 warps and more are on a
// multiprocessor at once. Their loads, 64 to 112 bytes a thread, are what hides the latency of memory. The
// kernel that has the code for every pair of types, and for float64, takes up to 128: 16 warps.
constexpr int kUniformBlocks = 4;
constexpr int kAnyBlocks = 2;

template <class P>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};

// A chunk's part of every stream.
template <class P, class G, class T>
struct Streams {
  P* param;
  const G* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;
};

template <bool kAmsgrad, class P, class G, class T>
__device__ bool all_aligned(const Streams<P, G, T>& s) {
  return is_aligned(s.param) && is_aligned(s.grad) && is_aligned(s.exp_avg) && is_aligned(s.exp_avg_sq) &&
         (!kAmsgrad || is_aligned(s.max_exp_avg_sq));
}

template <bool kAmsgrad, class P, class G, class T>
__device__ void update_one(const Streams<P, G, T>& s, int32_t i, const Coefficients<T>& c) {
  T param = as<T>(s.param[i]);
  T unused = 0;
  adamw<kAmsgrad>(param, as<T>(s.grad[i]), s.exp_avg[i], s.exp_avg_sq[i],
                  kAmsgrad ? s.max_exp_avg_sq[i] : unused, c);
  assign(s.param[i], param);
}

// A thread takes as many elements in a turn as fill 128 bits of its narrowest stream. What is narrower than
// the arithmetic is read once a turn, the other streams in parts of 128 bits each: so few registers suffice.
template <bool kAmsgrad, class P, class G, class T>
struct Turn {
  static constexpr bool kNarrowParam = sizeof(P) < sizeof(T);
  static constexpr bool kNarrowGrad = sizeof(G) < sizeof(T);
  static constexpr int kPart = 16 / sizeof(T);
  static constexpr int kElements = 16 / (kNarrowGrad && sizeof(G) < sizeof(P) ? sizeof(G)
                                         : kNarrowParam                       ? sizeof(P)
                                                                              : sizeof(T));

  // Elements p[k] and g[k], which are number i + k of the streams.
  static __device__ void update_part(const Streams<P, G, T>& s, int32_t i, P* p, G* g,
                                     const Coefficients<T>& c) {
    T m[kPart], v[kPart], largest_v[kPart];
    if constexpr (!kNarrowParam) {
      load<kPart>(s.param + i, p);
    }
    if constexpr (!kNarrowGrad) {
      load<kPart>(s.grad + i, g);
    }
    load<kPart>(s.exp_avg + i, m);
    load<kPart>(s.exp_avg_sq + i, v);
    if constexpr (kAmsgrad) {
      load<kPart>(s.max_exp_avg_sq + i, largest_v);
    }
#pragma unroll
    for (int k = 0; k < kPart; ++k) {
      T param = as<T>(p[k]);
      adamw<kAmsgrad>(param, as<T>(g[k]), m[k], v[k], largest_v[k], c);
      assign(p[k], param);
    }
    if constexpr (!kNarrowParam) {
      store<kPart>(s.param + i, p);
    }
    store<kPart>(s.exp_avg + i, m);
    store<kPart>(s.exp_avg_sq + i, v);
    if constexpr (kAmsgrad) {
      store<kPart>(s.max_exp_avg_sq + i, largest_v);
    }
  }

  static __device__ void update(const Streams<P, G, T>& s, int32_t i, const Coefficients<T>& c) {
    P p[kElements];
    G g[kElements];
    if constexpr (kNarrowParam) {
      load<kElements>(s.param + i, p);
    }
    if constexpr (kNarrowGrad) {
      load<kElements>(s.grad + i, g);
    }
#pragma unroll
    for (int part = 0; part < kElements; part += kPart) {
      update_part(s, i + part, p + part, g + part, c);
    }
    if constexpr (kNarrowParam) {
      store<kElements>(s.param + i, p);
    }
  }
};

template <bool kAmsgrad, class P, class G, class T>
__device__ void update_chunk(const Streams<P, G, T>& s, int32_t count, const Coefficients<T>& c) {
  using Turn = Turn<kAmsgrad, P, G, T>;
  int32_t done = 0;
  if (all_aligned<kAmsgrad>(s)) {
    done = count / Turn::kElements * Turn::kElements;
#pragma unroll 1
    for (int32_t i = static_cast<int32_t>(threadIdx.x) * Turn::kElements; i < done;
         i += kThreads * Turn::kElements) {
      Turn::update(s, i, c);
    }
  }
#pragma unroll 1
  for (int32_t i = done + static_cast<int32_t>(threadIdx.x); i < count; i += kThreads) {
    update_one<kAmsgrad>(s, i, c);
  }
}

__device__ const Coefficients<float>& of_type(const CoefficientRow& row, float) { return row.as_float; }
__device__ const Coefficients<double>& of_type(const CoefficientRow& row, double) { return row.as_double; }

// One chunk of a tensor that has a gradient.
struct Work {
  const TensorRecord& record;
  const TensorPointers& pointers;
  const CoefficientRow& row;
  const Chunk& chunk;

  template <class P, class G>
  __device__ void update() const {
    using T = typename ArithmeticOf<P>::type;
    const Coefficients<T> c = of_type(row, T());
    const Streams<P, G, T> streams = {global(static_cast<P*>(pointers.param) + chunk.begin),
                                      global(static_cast<const G*>(pointers.grad) + chunk.begin),
                                      global(static_cast<T*>(record.exp_avg) + chunk.begin),
                                      global(static_cast<T*>(record.exp_avg_sq) + chunk.begin),
                                      global(static_cast<T*>(record.max_exp_avg_sq) + chunk.begin)};
    if (record.max_exp_avg_sq != nullptr) {
      update_chunk<true>(streams, chunk.count, c);
    } else {
      update_chunk<false>(streams, chunk.count, c);
    }
  }
};

// Calls update(work) for this block's chunk, and advances the counters that are the block's to advance.
template <class Update>
__device__ void update_block(const Table& table, const StepState& state, const Update& update) {
  const bool skip = table.header->skip != 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    ++*(skip ? state.skipped : state.completed);
    advance(state.history);
  }
  if (skip || blockIdx.x >= table.chunk_count) {
    return;
  }
  const Chunk chunk = table.chunks[blockIdx.x];
  const TensorRecord& record = table.tensors[chunk.tensor];
  const TensorPointers pointers = table.pointers[chunk.tensor];
  if (pointers.grad == nullptr) {
    return;
  }
  if (chunk.begin == 0 && threadIdx.x == 0) {
    *global(record.step) += 1.0;
  }
  update(Work{record, pointers, table.coefficients[chunk.tensor], chunk});
}

template <class P, class G>
__global__ void __launch_bounds__(kThreads, kUniformBlocks) adamw_uniform(Table table, StepState state) {
  update_block(table, state, [](const Work& work) { work.update<P, G>(); });
}

// Calls f with a value of the type that `dtype` names.
template <class F>
__device__ void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float());
    case DType::kFloat64:
      return f(double());
    case DType::kBFloat16:
      return f(BFloat16());
    case DType::kFloat16:
      return f(Float16());
    case DType::kOther:
      break;  // never reaches a list
  }
}

__global__ void __launch_bounds__(kThreads, kAnyBlocks) adamw_any(Table table, StepState state) {
  update_block(table, state, [](const Work& work) {
    with_type(work.record.param_dtype, [&](auto p) {
      with_type(work.record.grad_dtype, [&](auto g) { work.update<decltype(p), decltype(g)>(); });
    });
  });
}

using Kernel = void (*)(Table, StepState);

template <class P>
Kernel uniform_kernel(DType grad_dtype) {
  switch (grad_dtype) {
    case DType::kFloat32:
      return adamw_uniform<P, float>;
    case DType::kBFloat16:
      return adamw_uniform<P, BFloat16>;
    case DType::kFloat16:
      return adamw_uniform<P, Float16>;
    default:
      return adamw_any;
  }
}

Kernel kernel_for(DType param_dtype, DType grad_dtype) {
  switch (param_dtype) {
    case DType::kFloat32:
      return uniform_kernel<float>(grad_dtype);
    case DType::kBFloat16:
      return uniform_kernel<BFloat16>(grad_dtype);
    case DType::kFloat16:
      return uniform_kernel<Float16>(grad_dtype);
    default:
      return adamw_any;
  }
}

}  // namespace

void update(const Table& table, const StepState& state, cudaStream_t stream) {
  launch("the update", kernel_for(table.param_dtype, table.grad_dtype), table.chunk_count, stream, table,
         state);
}

cudaError_t load_update(DType param_dtype, DType grad_dtype) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, kernel_for(param_dtype, grad_dtype));
}

std::string missing_code() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, adamw_any);
  cudaGetLastError();
  return error == cudaSuccess ? std::string() : described(error);
}

}  // namespace nexus::cuda
