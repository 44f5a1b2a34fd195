// The row that one step makes of what the user set for a group (record.h). Host and device; no torch.
#pragma once

#include "history.h"
#include "schedule.h"

namespace nexus {

// One step's hyperparameters of a group.
struct Row {
  double lr;
  double weight_decay;
  double beta1;
  double beta2;
  double eps;
  double clip;             // what the gradients are multiplied by to keep to the group's max_grad_norm
  double grad_multiplier;  // clip / gradient scale; negative to maximize
  double average_weight;   // of the new parameter in its average
};

NEXUS_FN double rate_at(const Rate& rate, int64_t t) {
  if (rate.table != nullptr) {
    const int64_t at = rate.clock != nullptr ? *rate.clock : t;
    return rate.scale * evaluate_schedule(rate.table, rate.layers, rate.rows, at);
  }
  if (rate.tensor != nullptr) {
    return rate.is_float64 != 0 ? *static_cast<const double*>(rate.tensor)
                                : static_cast<double>(*static_cast<const float*>(rate.tensor));
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
  row.average_weight = 1.0 - rate_at(group.average_decay, t);
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
