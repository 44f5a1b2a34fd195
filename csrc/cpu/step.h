// One optimizer step over a list of tensors on the CPU.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "../hyperparameters.h"
#include "kernels.h"

namespace nexus::cpu {

// Records, groups and the division of work, with the scratch memory that a step needs: a step allocates
// nothing.
struct TensorList {
  std::vector<TensorRecord> tensors;
  std::vector<Group> groups;
  StepState state = {};

  // To be called after `tensors` has changed, before any step.
  void divide();

  // Two tensors whose parameters share memory, or {-1, -1}. Threads would race on them.
  std::pair<int64_t, int64_t> overlap() const;

  // The sum of squares of all gradients, in float64. Chunks are summed in a fixed order: the number of
  // threads does not change a bit of the result.
  double sum_of_squares(int threads);

  // Decides whether to skip, advances the counters, evaluates the rates and updates every tensor.
  void step(int threads);

  // Reads and writes back, unchanged, what step() reads and writes: the time that memory alone takes, to
  // measure step() against. False, and nothing done, unless all streams are float32, without amsgrad.
  bool traffic(int threads);

  const Kernels* kernels = cpu::kernels();

 private:
  // Shares that one thread takes before it helps the others. A cache line each.
  struct alignas(64) Region {
    std::atomic<size_t> next{0};
    size_t end = 0;
  };

  template <class Work>
  void for_each_chunk(int threads, const Work& work);
  bool prepare();  // false: this step is skipped

  std::vector<Chunk> chunks_;
  std::vector<int32_t> shares_;  // shares_[i] .. shares_[i + 1] are the chunks of one unit of work
  std::unique_ptr<Region[]> regions_;
  size_t region_count_ = 0;
  std::vector<double> partial_sums_;
  std::vector<Coefficients<float>> float_coefficients_;    // one a tensor
  std::vector<Coefficients<double>> double_coefficients_;  // one a tensor
};

}  // namespace nexus::cpu
