// The update of every tensor: a block for each chunk, a launch for each kind that occurs. And the kernels of
// the plain kinds, where nothing has fewer bits than the arithmetic but the parameter and its gradient: one
// for each pair of their codecs.
#include "kernels.h"
#include "launch.h"
#include "turns.h"

namespace nexus::cuda {
namespace {

// A chunk's part of every stream.
template <class P, class G, class T>
struct Streams {
  P* param;
  const G* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;  // null without amsgrad
  T* average;         // null without one
};

// Adjacent elements of every stream, as they are stored.
template <bool kAmsgrad, bool kAveraged, int kElements, class P, class G, class T>
struct Elements {
  static constexpr int kCount = kElements;

  Pack<P, kCount> param;
  Pack<G, kCount> grad;
  Pack<T, kCount> exp_avg;
  Pack<T, kCount> exp_avg_sq;
  Pack<T, kAmsgrad ? kCount : 1> max_exp_avg_sq;
  Pack<T, kAveraged ? kCount : 1> average;

  __device__ void fetch(const Streams<P, G, T>& s, int32_t i) {
    param = cuda::fetch<kCount>(s.param + i);
    grad = cuda::fetch<kCount>(s.grad + i);
    exp_avg = cuda::fetch<kCount>(s.exp_avg + i);
    exp_avg_sq = cuda::fetch<kCount>(s.exp_avg_sq + i);
    if constexpr (kAmsgrad) {
      max_exp_avg_sq = cuda::fetch<kCount>(s.max_exp_avg_sq + i);
    }
    if constexpr (kAveraged) {
      average = cuda::fetch<kCount>(s.average + i);
    }
  }

  __device__ void update(const Streams<P, G, T>&, int32_t, const Coefficients<T>& c) {
    T p[kCount], g[kCount], m[kCount], v[kCount], largest_v[kCount] = {};
    load(param.elements, p, kCount);
    load(grad.elements, g, kCount);
    load(exp_avg.elements, m, kCount);
    load(exp_avg_sq.elements, v, kCount);
    if constexpr (kAmsgrad) {
      load(max_exp_avg_sq.elements, largest_v, kCount);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      adamw<kAmsgrad>(p[k], g[k], m[k], v[k], largest_v[k], c);
      if constexpr (kAveraged) {
        average.elements[k] = averaged(average.elements[k], p[k], c.average_weight);
      }
    }
    store(p, param.elements, kCount);
    store(m, exp_avg.elements, kCount);
    store(v, exp_avg_sq.elements, kCount);
    if constexpr (kAmsgrad) {
      store(largest_v, max_exp_avg_sq.elements, kCount);
    }
  }

  __device__ void put(const Streams<P, G, T>& s, int32_t i) const {
    cuda::put(param, s.param + i);
    cuda::put(exp_avg, s.exp_avg + i);
    cuda::put(exp_avg_sq, s.exp_avg_sq + i);
    if constexpr (kAmsgrad) {
      cuda::put(max_exp_avg_sq, s.max_exp_avg_sq + i);
    }
    if constexpr (kAveraged) {
      cuda::put(average, s.average + i);
    }
  }
};

template <bool kAmsgrad, bool kAveraged, class P, class G, class T>
__device__ void update_chunk(const Streams<P, G, T>& s, int32_t count, const Coefficients<T>& c) {
  constexpr int kCount = 16 / sizeof(T);  // of the moments, 16 bytes
  const bool aligned = is_aligned<kCount>(s.param) && is_aligned<kCount>(s.grad) &&
                       is_aligned<kCount>(s.exp_avg) && is_aligned<kCount>(s.exp_avg_sq) &&
                       is_aligned<kCount>(s.max_exp_avg_sq) && is_aligned<kCount>(s.average);
  const int32_t whole = aligned ? count / kCount * kCount : 0;
  constexpr int kTurns = kAmsgrad && kAveraged ? 1 : 2;  // as many as the registers hold
  update_range<kTurns, Elements<kAmsgrad, kAveraged, kCount, P, G, T>>(s, 0, whole, c);
  update_range<4, Elements<kAmsgrad, kAveraged, 1, P, G, T>>(s, whole, count, c);
}

// And that of the average, where there is one.
template <bool kAmsgrad, class P, class G, class T>
__device__ void update_chunk(Streams<P, G, T>& s, const Work& work, const Coefficients<T>& c) {
  if (work.record.average != nullptr) {
    s.average = global(static_cast<T*>(work.record.average) + work.chunk.begin);
    update_chunk<kAmsgrad, true>(s, work.chunk.count, c);
  } else {
    update_chunk<kAmsgrad, false>(s, work.chunk.count, c);
  }
}

__device__ const Coefficients<float>& of_type(const CoefficientRow& row, float) {
  return row.as_float.coefficients;
}
__device__ const Coefficients<double>& of_type(const CoefficientRow& row, double) { return row.as_double; }

// Blocks that share a multiprocessor: 4 leave a thread 64 registers, which suffice where no stream is
// float64. Then 32 warps have their loads, 96 to 160 bytes a thread, on the way at once, which hides memory's
// latency.
template <class P, class G>
constexpr int kBlocks = sizeof(P) == sizeof(double) || sizeof(G) == sizeof(double) ? 2 : 4;

// The chunks of the tensors whose codecs are P and G.
template <class P, class G>
__global__ void __launch_bounds__(kThreads, kBlocks<P, G>)
    update_tensors(Table table, StepState state, int kind, bool advances) {
  using T = typename ArithmeticOf<P>::type;
  if (!has_work(table, state, advances)) {
    return;
  }
  const Work work(table);
  const auto& [chunk, record, pointers] = work;
  if (pointers.grad == nullptr || kind_of(record) != kind) {
    return;
  }
  count_update(work);
  const Coefficients<T> c = of_type(table.coefficients[chunk.tensor], T());
  Streams<P, G, T> streams = {global(static_cast<P*>(pointers.param) + chunk.begin),
                              global(static_cast<const G*>(pointers.grad) + chunk.begin),
                              global(static_cast<T*>(record.exp_avg) + chunk.begin),
                              global(static_cast<T*>(record.exp_avg_sq) + chunk.begin),
                              nullptr,
                              nullptr};
  if (record.max_exp_avg_sq != nullptr) {
    streams.max_exp_avg_sq = global(static_cast<T*>(record.max_exp_avg_sq) + chunk.begin);
    update_chunk<true>(streams, work, c);
  } else {
    update_chunk<false>(streams, work, c);
  }
}

UpdateKernel plain_kernel(int kind) {
  return with_codec(static_cast<DType>(kind / kFloatTypes), [=](auto param) {
    return with_codec(static_cast<DType>(kind % kFloatTypes), [=](auto grad) -> UpdateKernel {
      return update_tensors<decltype(param), decltype(grad)>;
    });
  });
}

UpdateKernel kernel_of(int kind) { return kind < kPlainKinds ? plain_kernel(kind) : encoded_kernel(kind); }

}  // namespace

void update(const Table& table, const StepState& state, cudaStream_t stream) {
  table.kinds.for_each([&](int kind, bool is_last) {
    launch("the update", kernel_of(kind), table.chunk_count, stream, table, state, kind,
           is_last && state.advances != 0);
  });
}

cudaError_t load_update(const Kinds& kinds) {
  cudaError_t error = cudaSuccess;
  kinds.for_each([&](int kind, bool) {
    cudaFuncAttributes attributes;
    const cudaError_t failure = cudaFuncGetAttributes(&attributes, kernel_of(kind));
    error = failure == cudaSuccess ? error : failure;
  });
  return error;
}

std::string missing_code() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, update_tensors<float, float>);
  cudaGetLastError();
  return error == cudaSuccess ? std::string() : described(error);
}

}  // namespace nexus::cuda
