// One optimizer step on the CPU.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "../hyperparameters.h"
#include "kernels.h"

namespace nexus::cpu {

// The division of the work among threads, with the scratch memory that a step needs: a step allocates
// nothing.
class Step {
 public:
  explicit Step(const Records& records) : records_(records) {}

  StepState state = {};
  const Kernels* kernels = cpu::kernels();

  // To be called after the records' tensors have changed, before any run.
  void divide();

  // The sum of squares of all gradients, in float64. Chunks are summed in a fixed order: the number of
  // threads does not change a bit of the result.
  double sum_of_squares(int threads);

  // Decides whether to skip, advances the counters, evaluates the rates, leaves a row in the history, and
  // updates every tensor.
  void run(int threads);

 private:
  // Shares that one thread takes before it helps the others. A cache line each.
  struct alignas(64) Region {
    std::atomic<size_t> next{0};
    size_t end = 0;
  };

  template <class Work>
  void for_each_chunk(int threads, const Work& work);
  bool prepare();  // false: this step is skipped
  void fetch_ahead(const Chunk& chunk) const;

  const Records& records_;
  std::vector<Chunk> chunks_;
  std::vector<int32_t> shares_;  // shares_[i] .. shares_[i + 1] are the chunks of one unit of work
  std::unique_ptr<Region[]> regions_;
  size_t region_count_ = 0;
  std::vector<double> partial_sums_;
  std::vector<Coefficients<float>> float_coefficients_;    // one a tensor
  std::vector<Coefficients<double>> double_coefficients_;  // one a tensor
};

}  // namespace nexus::cpu
