// What a step decides once, in float64: whether to skip, every group's rates, and every tensor's
// coefficients. It reads the counters, and writes where the next row of the history is to be; update()
// advances both.
#include "kernels.h"
#include "launch.h"

namespace nexus::cuda {
namespace {

// Coefficients of a block's tensors. Two powers of beta are the work of a prologue, so that a tensor takes
// over what the first of its group in this block has, where both have made as many updates: mostly all have.
// One that has products of its own in their place offers NaN for its count, and finds none.
class Shared {
 public:
  __device__ void offer(int32_t group, double count) {
    groups_[threadIdx.x] = group;
    counts_[threadIdx.x] = count;
  }

  // Whether this thread's tensor is the first of its group. To be called once all have offered theirs.
  __device__ bool is_first() const {
    return threadIdx.x == 0 || groups_[threadIdx.x - 1] != groups_[threadIdx.x];
  }

  __device__ void put(const Coefficients<double>& c) { coefficients_[threadIdx.x] = c; }

  // Those of the first tensor of the group; null where it has made another number of updates.
  __device__ const Coefficients<double>* find(int32_t group, double count) const {
    int low = 0;  // the first is in [low, high]: tensors come in the order of their groups
    for (int high = static_cast<int>(threadIdx.x); low < high;) {
      const int middle = (low + high) / 2;
      if (groups_[middle] < group) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return counts_[low] == count ? &coefficients_[low] : nullptr;
  }

 private:
  int32_t groups_[kThreads];
  double counts_[kThreads];
  Coefficients<double> coefficients_[kThreads];
};

// A block for kThreads tensors. The first one evaluates every group, for its readers; another one the groups
// of its tensors, which several blocks may do: they write the same.
__global__ void __launch_bounds__(kThreads) prepare(Table table, StepState state) {
  __shared__ Shared shared;
  const bool is_reader = blockIdx.x == 0;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kThreads;
  const int64_t end = begin + kThreads < table.tensor_count ? begin + kThreads : table.tensor_count;
  const bool measures_norm = state.sum_of_squares != nullptr;
  const double grad_scale = gradient_scale(state);
  const double grad_norm = measures_norm ? sqrt(*state.sum_of_squares) / grad_scale : 0.0;
  const bool skip = skips(state);
  const int64_t t = *state.completed;
  if (is_reader && threadIdx.x == 0) {
    if (measures_norm) {
      *state.grad_norm = grad_norm;
    }
    table.header->skip = skip;
    record_step(state.history, t, skip, measures_norm ? grad_norm : NAN);
  }
  const int64_t first_group = is_reader ? 0 : table.tensors[begin].group;
  const int64_t last_group = is_reader ? table.group_count - 1 : table.tensors[end - 1].group;
  for (int64_t i = first_group + threadIdx.x; i <= last_group; i += kThreads) {
    table.rows[i] = is_reader ? evaluated_row(state, table.groups[i], i, t, skip, grad_norm, grad_scale)
                              : row_at(table.groups[i], t, grad_norm, grad_scale);
  }
  if (skip) {
    return;
  }
  const int64_t i = begin + threadIdx.x;
  const TensorRecord* tensor = i < end ? &table.tensors[i] : nullptr;
  const double count = tensor == nullptr ? 0.0 : *tensor->step + 1.0;
  const bool has_products = tensor != nullptr && tensor->beta_products != nullptr;
  shared.offer(tensor == nullptr ? INT32_MAX : tensor->group, has_products ? NAN : count);
  __syncthreads();
  const auto own = [&] {
    const Row& row = table.rows[tensor->group];
    const BetaProducts products = beta_products(row, tensor->beta_products, count);
    table.coefficients[i].products = products;
    return coefficients(row, products, count);
  };
  if (tensor != nullptr && !has_products && shared.is_first()) {
    shared.put(own());
  }
  __syncthreads();
  if (tensor == nullptr) {
    return;
  }
  const Coefficients<double>* found = shared.find(tensor->group, count);
  const Coefficients<double> c = found != nullptr ? *found : own();
  if (tensor->param_dtype == DType::kFloat64) {
    table.coefficients[i].as_double = c;
  } else {
    table.coefficients[i].as_float = {rounded<float>(c), static_cast<int64_t>(count)};
  }
}

// A thread for each tensor. The kernels of the update have no register left for this.
__global__ void __launch_bounds__(kThreads) keep_each(Table table) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (table.header->skip != 0 || i >= table.tensor_count || pointers_of(table, i).grad == nullptr) {
    return;
  }
  const TensorRecord& tensor = table.tensors[i];
  if (tensor.beta_products != nullptr) {
    keep(table.coefficients[i].products, *tensor.step + 1.0, tensor.beta_products);
  }
}

__global__ void __launch_bounds__(kThreads) evaluate_at(const double* table, int64_t layers, int64_t rows,
                                                        const int64_t* steps, int64_t count, double* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    out[i] = evaluate_schedule(table, layers, rows, steps[i]);
  }
}

}  // namespace

cudaError_t load_prologue() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, prepare);
  return error != cudaSuccess ? error : cudaFuncGetAttributes(&attributes, keep_each);
}

void prologue(const Table& table, const StepState& state, cudaStream_t stream) {
  launch("the prologue of a step", prepare, (table.tensor_count + kThreads - 1) / kThreads, stream, table,
         state);
}

void keep_products(const Table& table, cudaStream_t stream) {
  launch("keeping the products of betas", keep_each, (table.tensor_count + kThreads - 1) / kThreads, stream,
         table);
}

void evaluate(const double* table, int64_t layers, int64_t rows, const int64_t* steps, int64_t count,
              double* out, cudaStream_t stream) {
  launch("evaluating a schedule", evaluate_at, (count + kThreads - 1) / kThreads, stream, table, layers, rows,
         steps, count, out);
}

}  // namespace nexus::cuda
