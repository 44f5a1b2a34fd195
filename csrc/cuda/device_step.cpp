#include "device_step.h"

#include <utility>

#include "kernels.h"
#include "launch.h"

namespace nexus::cuda {

DeviceStep::DeviceStep(const Records& records, const Part& part, std::unique_ptr<DeviceTable> table,
                       CapturedTables& captured)
    : records_(records), part_(part), table_(std::move(table)), captured_(captured) {
  const auto first = records.tensors.begin() + part.first_tensor;
  contents_.tensors.assign(first, first + part.tensor_count);
  contents_.pointers.resize(contents_.tensors.size());
  for (TensorRecord& tensor : contents_.tensors) {
    tensor.param = nullptr;
    tensor.grad = nullptr;
    tensor.place = static_cast<int32_t>(contents_.chunk_count);
    // One at least: the first chunk's block counts the tensor's steps.
    contents_.chunk_count += tensor.numel == 0 ? 1 : chunk_count(tensor.numel);
    contents_.kinds.add(tensor);
  }
  table_->forget();
  read_groups();
}

void DeviceStep::read_groups() {
  contents_.measures_norm = state.sum_of_squares != nullptr;
  const auto first = records_.groups.begin() + part_.first_group;
  contents_.groups.assign(first, first + part_.group_count);
}

const Table& DeviceStep::current_table(cudaStream_t stream) {
  for (size_t i = 0; i < contents_.pointers.size(); ++i) {
    const TensorRecord& tensor = records_.tensors[static_cast<size_t>(part_.first_tensor) + i];
    contents_.pointers[i] = {tensor.param, tensor.grad};
  }
  if (given.coefficients == nullptr) {
    read_groups();
  }

  const cudaGraph_t graph = graph_of(stream);
  if (graph == nullptr) {
    table_->write(contents_, stream);
    return table_->get();
  }
  const OutsideCapture outside;
  check(load_norm(), "loading the gradient norm");
  check(load_prologue(), "loading the prologue of a step");
  check(load_update(contents_.kinds), "loading the update");
  return captured_.table(part_.device, contents_, graph);
}

void DeviceStep::sum_of_squares(double* out, cudaStream_t stream) {
  const DeviceGuard guard(part_.device);
  cuda::sum_of_squares(current_table(stream), out, stream);
}

void DeviceStep::prologue(cudaStream_t stream) {
  const DeviceGuard guard(part_.device);
  is_prepared_ = false;
  read_groups();
  table_->write(contents_, stream);
  state.grad_scale = nullptr;
  state.found_inf = nullptr;
  cuda::prologue(table_->get(), state, stream);
  is_prepared_ = true;
  prepared_on_ = stream;
}

Prepared DeviceStep::prepared(size_t tensor, cudaStream_t stream) const {
  if (!is_prepared_ || stream != prepared_on_) {
    return {};
  }
  return {table_->get().header, table_->get().coefficients + tensor};
}

void DeviceStep::step(cudaStream_t stream) {
  const DeviceGuard guard(part_.device);
  is_prepared_ = false;
  Table table = current_table(stream);
  if (given.coefficients != nullptr) {
    table.header = given.header;
    table.coefficients = given.coefficients;
  } else {
    cuda::prologue(table, state, stream);
  }
  update(table, state, stream);
}

void DeviceStep::update_captured(cudaStream_t stream) {
  const DeviceGuard guard(part_.device);
  read_groups();
  captured_.write_groups(part_.device, contents_, stream);
}

}  // namespace nexus::cuda
