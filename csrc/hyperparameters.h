// What the user set for a parameter group, and the row that one step makes of it. Host and device; no torch.
#pragma once

#include "history.h"
#include "schedule.h"
#include "tensor_list.h"

namespace nexus {

// A number that may come from a Python float, from a one-element tensor, or from a schedule.
struct Rate {
  double value;        // the float; used where `tensor` and `table` are null
  const void* tensor;  // one element of type `tensor_dtype`, read at every step
  int64_t tensor_dtype;
  const double* table;  // a segment table (schedule.h) of `rows` rows, evaluated at every step
  int64_t rows;
  double scale;  // multiplies the schedule
  double* last;  // where a schedule's value is left for the reader, once used
};

struct Group {
  Rate lr;
  Rate weight_decay;
  double beta1;
  double beta2;
  double eps;
  double max_grad_norm;  // infinite: no clipping
  int64_t maximize;
};

// What all groups of an optimizer share on one device. Counters are int64 in device memory.
struct StepState {
  int64_t* completed;            // t: updates completed so far; the argument of every schedule
  int64_t* skipped;              // steps that changed nothing since their gradients were not finite
  const double* sum_of_squares;  // of every gradient as it stands in memory, or null if nobody asked for it
  double* grad_norm;             // where the norm is left for the reader, or null
  const float* grad_scale;       // gradients are to be divided by this, or null
  const float* found_inf;        // nonzero: skip this step, or null
  int64_t skip_nonfinite;
  History history;
};

// One step's hyperparameters of a group.
struct Row {
  double lr;
  double weight_decay;
  double beta1;
  double beta2;
  double eps;
  double clip;             // what the gradients are multiplied by to keep to the group's max_grad_norm
  double grad_multiplier;  // clip / gradient scale; negative to maximize
};

NEXUS_FN double read_scalar(const void* p, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return *static_cast<const double*>(p);
    case DType::kFloat32:
    default:
      return static_cast<double>(*static_cast<const float*>(p));
  }
}

NEXUS_FN double rate_at(const Rate& rate, int64_t t) {
  if (rate.table != nullptr) {
    return rate.scale * evaluate_schedule(rate.table, rate.rows, t);
  }
  if (rate.tensor != nullptr) {
    return read_scalar(rate.tensor, static_cast<DType>(rate.tensor_dtype));
  }
  return rate.value;
}

NEXUS_FN double gradient_scale(const StepState& state) {
  return state.grad_scale == nullptr ? 1.0 : static_cast<double>(*state.grad_scale);
}

NEXUS_FN bool skips(const StepState& state) {
  if (state.found_inf != nullptr && *state.found_inf != 0.0f) {
    return true;
  }
  // The sum is in float64: it is finite if and only if every gradient is (below 1e150 in float64).
  return state.skip_nonfinite != 0 && !(*state.sum_of_squares <= 1.7976931348623157e308);
}

NEXUS_FN double clip_coefficient(const Group& group, double grad_norm) {
  if (!(group.max_grad_norm <= 1.7976931348623157e308)) {
    return 1.0;
  }
  // As torch.nn.utils.clip_grad_norm_, so that a NaN norm stays NaN.
  const double coefficient = group.max_grad_norm / (grad_norm + 1e-6);
  return coefficient > 1.0 ? 1.0 : coefficient;
}

NEXUS_FN Row row_at(const Group& group, int64_t t, double grad_norm, double grad_scale) {
  Row row;
  row.lr = rate_at(group.lr, t);
  row.weight_decay = rate_at(group.weight_decay, t);
  row.beta1 = group.beta1;
  row.beta2 = group.beta2;
  row.eps = group.eps;
  row.clip = clip_coefficient(group, grad_norm);
  row.grad_multiplier = 1.0 / grad_scale * row.clip;
  if (group.maximize != 0) {
    row.grad_multiplier = -row.grad_multiplier;
  }
  return row;
}

// The row of a group in the step with t completed updates before it, into the history too. The scheduled
// rates are left where their reader looks, unless the step is skipped.
NEXUS_FN Row evaluated_row(const StepState& state, const Group& group, int64_t index, int64_t t, bool skipped,
                           double grad_norm, double grad_scale) {
  const Row row = row_at(group, t, grad_norm, grad_scale);
  record_group(state.history, index, row.lr, row.clip);
  if (!skipped && group.lr.last != nullptr) {
    *group.lr.last = row.lr;
  }
  if (!skipped && group.weight_decay.last != nullptr) {
    *group.weight_decay.last = row.weight_decay;
  }
  return row;
}

}  // namespace nexus
