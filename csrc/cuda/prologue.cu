// What a step decides once, in one block and in float64: whether to skip, every group's rates, and every
// tensor's coefficients. It reads the counters, and writes where the next row of the history is to be;
// update() advances both.
#include "kernels.h"
#include "launch.h"

namespace nexus::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) prepare(Table table, StepState state) {
  __shared__ bool skip;
  __shared__ double grad_norm;
  const double grad_scale = gradient_scale(state);
  const int64_t t = *state.completed;
  if (threadIdx.x == 0) {
    grad_norm = 0.0;
    if (state.sum_of_squares != nullptr) {
      grad_norm = sqrt(*state.sum_of_squares) / grad_scale;
      *state.grad_norm = grad_norm;
    }
    skip = skips(state);
    table.header->skip = skip;
    record_step(state.history, t, skip, state.sum_of_squares == nullptr ? NAN : grad_norm);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < table.group_count; i += kThreads) {
    table.rows[i] = evaluated_row(state, table.groups[i], i, t, skip, grad_norm, grad_scale);
  }
  if (skip) {
    return;
  }
  __syncthreads();
  int32_t group = -1;
  double step = -1.0;  // of the coefficients at hand: tensors of one group mostly share theirs
  Coefficients<double> as_double = {};
  for (int64_t i = threadIdx.x; i < table.tensor_count; i += kThreads) {
    if (table.pointers[i].grad == nullptr) {
      continue;
    }
    const TensorRecord& tensor = table.tensors[i];
    const double count = *tensor.step + 1.0;
    if (tensor.group != group || count != step) {
      group = tensor.group;
      step = count;
      as_double = coefficients(table.rows[group], count);
    }
    if (tensor.param_dtype == DType::kFloat64) {
      table.coefficients[i].as_double = as_double;
    } else {
      table.coefficients[i].as_float = rounded<float>(as_double);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    evaluate_at(const double* table, int64_t rows, const int64_t* steps, int64_t count, double* out) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) {
    out[i] = evaluate_schedule(table, rows, steps[i]);
  }
}

}  // namespace

cudaError_t load_prologue() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, prepare);
}

void prologue(const Table& table, const StepState& state, cudaStream_t stream) {
  launch("the prologue of a step", prepare, 1, stream, table, state);
}

void evaluate(const double* table, int64_t rows, const int64_t* steps, int64_t count, double* out,
              cudaStream_t stream) {
  launch("evaluating a schedule", evaluate_at, (count + kThreads - 1) / kThreads, stream, table, rows, steps,
         count, out);
}

}  // namespace nexus::cuda
