#include "step.h"

#include <algorithm>

#include "parallel.h"

namespace nexus::cpu {

// No thread is called for less than about 20 us of work (65,536 elements): it comes within 1 us while it
// spins, as it does after a backward pass, but in about 90 us once it sleeps.
constexpr size_t kSharesPerThread = 4;
constexpr size_t kFetchedBytes = 1024;

void Step::divide() {
  chunks_.clear();
  shares_.assign(1, 0);
  int64_t elements = 0;  // in the current share
  for (size_t i = 0; i < records_.tensors.size(); ++i) {
    const int64_t numel = records_.tensors[i].numel;
    for (int64_t k = 0; k < chunk_count(numel); ++k) {
      chunks_.push_back(chunk_at(numel, k, static_cast<int32_t>(i)));
      elements += chunks_.back().count;
      if (elements >= kChunkElements) {
        shares_.push_back(static_cast<int32_t>(chunks_.size()));
        elements = 0;
      }
    }
  }
  if (elements > 0) {
    shares_.push_back(static_cast<int32_t>(chunks_.size()));
  }
  partial_sums_.assign(chunks_.size(), 0.0);
  float_coefficients_.resize(records_.tensors.size());
  double_coefficients_.resize(records_.tensors.size());
}

// Every thread begins with a region of its own, the same in every step, so that what its core has in its
// cache stays there; once done, it takes what is left in the others', so that a slow core holds nobody up.
template <class Work>
void Step::for_each_chunk(int threads, const Work& work) {
  const size_t shares = shares_.size() - 1;
  const size_t wanted =
      std::clamp<size_t>(shares / kSharesPerThread, 1, static_cast<size_t>(std::max(threads, 1)));
  if (wanted > region_count_) {
    regions_ = std::make_unique<Region[]>(wanted);
    region_count_ = wanted;
  }
  for (size_t i = 0; i < wanted; ++i) {
    regions_[i].next = shares * i / wanted;
    regions_[i].end = shares * (i + 1) / wanted;
  }
  struct Job {
    const Step& step;
    const Work& work;
    size_t regions;
  } job{*this, work, wanted};
  run_parallel(
      static_cast<int>(wanted),
      [](void* context, int thread) {
        const auto& [step, work, regions] = *static_cast<const Job*>(context);
        for (size_t i = 0; i < regions; ++i) {
          Region& region = step.regions_[(static_cast<size_t>(thread) + i) % regions];
          for (size_t share = region.next++; share < region.end; share = region.next++) {
            for (int32_t k = step.shares_[share]; k < step.shares_[share + 1]; ++k) {
              work(static_cast<size_t>(k), step.chunks_[static_cast<size_t>(k)]);
            }
          }
        }
      },
      &job);
}

double Step::sum_of_squares(int threads) {
  for_each_chunk(threads, [this](size_t k, const Chunk& chunk) {
    const TensorRecord& tensor = records_.tensors[static_cast<size_t>(chunk.tensor)];
    partial_sums_[k] = tensor.grad == nullptr ? 0.0
                                              : kernels->sum_of_squares(tensor.grad, tensor.grad_dtype,
                                                                        chunk.begin, chunk.count);
  });
  double sum = 0.0;
  for (const double partial : partial_sums_) {
    sum += partial;
  }
  return sum;
}

// Streams lie apart, and the processor's own prefetching begins anew with each chunk: it is given a start.
void Step::fetch_ahead(const Chunk& chunk) const {
  const TensorRecord& tensor = records_.tensors[static_cast<size_t>(chunk.tensor)];
  const auto fetch = [&chunk](const void* stream, size_t item) {
    const char* begin = static_cast<const char*>(stream) + static_cast<size_t>(chunk.begin) * item;
    for (size_t line = 0; line < kFetchedBytes && line < static_cast<size_t>(chunk.count) * item;
         line += 64) {
      __builtin_prefetch(begin + line);
    }
  };
  fetch(tensor.param, item_size(tensor.param_dtype));
  fetch(tensor.grad, item_size(tensor.grad_dtype));
  fetch(tensor.exp_avg, item_size(tensor.exp_avg_dtype));
  fetch(tensor.exp_avg_sq, item_size(tensor.exp_avg_sq_dtype));
  if (tensor.master_low != nullptr) {
    fetch(tensor.master_low, item_size(tensor.master_low_dtype));
  }
  if (tensor.average != nullptr) {
    fetch(tensor.average, item_size(average_dtype(tensor)));
  }
}

bool Step::prepare() {
  const double grad_scale = gradient_scale(state);
  double grad_norm = 0.0;
  if (state.sum_of_squares != nullptr) {
    grad_norm = sqrt(*state.sum_of_squares) / grad_scale;
    *state.grad_norm = grad_norm;
  }
  const int64_t t = *state.completed;
  const bool skip = skips(state);
  const auto evaluate = [&](int32_t group) {
    return evaluated_row(state, records_.groups[static_cast<size_t>(group)], group, t, skip, grad_norm,
                         grad_scale);
  };
  const auto group_count = static_cast<int32_t>(records_.groups.size());
  record_step(state.history, t, skip, state.sum_of_squares == nullptr ? NAN : grad_norm);
  if (skip) {
    for (int32_t i = 0; i < group_count; ++i) {
      evaluate(i);
    }
    advance(state.history);
    *state.skipped += state.advances;
    return false;
  }
  *state.completed += state.advances;
  int32_t group = -1;
  double step = -1.0;  // of the coefficients at hand: tensors of one group mostly share theirs
  Row row = {};
  int32_t evaluated = 0;
  Coefficients<double> as_double = {};
  Coefficients<float> as_float = {};
  for (size_t i = 0; i < records_.tensors.size(); ++i) {
    const TensorRecord& tensor = records_.tensors[i];
    // Tensors come in the order of their groups. Every group is evaluated, also one that has none.
    for (; evaluated <= tensor.group; ++evaluated) {
      row = evaluate(evaluated);
    }
    if (tensor.grad == nullptr) {
      continue;
    }
    const double count = *tensor.step += 1.0;
    if (tensor.group != group || count != step) {
      group = tensor.group;
      step = count;
      as_double = coefficients(row, count);
      as_float = rounded<float>(as_double);
    }
    float_coefficients_[i] = as_float;
    double_coefficients_[i] = as_double;
  }
  for (; evaluated < group_count; ++evaluated) {
    evaluate(evaluated);
  }
  advance(state.history);
  return true;
}

void Step::run(int threads) {
  if (!prepare()) {
    return;
  }
  for_each_chunk(threads, [this](size_t k, const Chunk& chunk) {
    const auto i = static_cast<size_t>(chunk.tensor);
    const TensorRecord& tensor = records_.tensors[i];
    if (k + 1 < chunks_.size()) {
      fetch_ahead(chunks_[k + 1]);
    }
    if (tensor.grad == nullptr) {
      return;
    }
    const Chance chance = chance_of(tensor, state.seed, static_cast<int64_t>(*tensor.step));
    if (tensor.param_dtype == DType::kFloat64) {
      kernels->update_double(tensor, chance, double_coefficients_[i], chunk.begin, chunk.count);
    } else {
      kernels->update_float(tensor, chance, float_coefficients_[i], chunk.begin, chunk.count);
    }
  });
}

}  // namespace nexus::cpu
