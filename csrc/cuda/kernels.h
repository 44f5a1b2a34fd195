// The launches of a step, in the order in which they are enqueued. Each throws where a launch fails.
#pragma once

#include <cuda_runtime.h>

#include <string>

#include "table.h"

namespace nexus::cuda {

// What one launch of upload() can take: with its other arguments just below 4 KB, the most that every version
// of CUDA allows.
constexpr size_t kUploadBytes = 3968;

// Writes `bytes` (a multiple of 8) to the device. They travel as kernel arguments: no memory of the host has
// to outlive the call, and nothing waits.
void upload(void* to, const void* from, size_t bytes, cudaStream_t stream);

// Fills in `chunks`, from the tensors' `numel` and `place`.
void divide(const Table& table, cudaStream_t stream);

// The sum of squares of all gradients, in float64: the same bits whatever the device and wherever they lie.
void sum_of_squares(const Table& table, double* out, cudaStream_t stream);

// Decides whether to skip, and evaluates the schedules and everything that depends on them alone.
void prologue(const Table& table, const StepState& state, cudaStream_t stream);

// Leaves the products of betas in the records of the tensors that have them, and are about to be updated.
void keep_products(const Table& table, cudaStream_t stream);

// Updates every tensor, in a launch for each kind, of which the last advances the counters. No other launch
// changes the optimizer.
void update(const Table& table, const StepState& state, cudaStream_t stream);

// The kernel of a kind that is no plain one.
using UpdateKernel = void (*)(Table, StepState, int kind, bool advances);
UpdateKernel encoded_kernel(int kind);

// A schedule's values at `steps`.
void evaluate(const double* table, int64_t layers, int64_t rows, const int64_t* steps, int64_t count,
              double* out, cudaStream_t stream);

// Bring the code of a step's kernels to the current device, which otherwise their first launches do: not to
// be left to a launch that is captured.
cudaError_t load_norm();
cudaError_t load_prologue();
cudaError_t load_update(const Kinds& kinds);

// Why the current device cannot run these kernels, or an empty string.
std::string missing_code();

}  // namespace nexus::cuda
