// The part of the Python module that is there if it was built with nvcc.
#ifdef NEXUS_CUDA

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/captured_tables.h"
#include "../cuda/device_step.h"
#include "../cuda/kernels.h"
#include "binding.h"
#include "device_memory.h"

#ifndef NEXUS_CUDA_ARCHS
#define NEXUS_CUDA_ARCHS ""
#endif

namespace nexus {
namespace {

cudaStream_t stream_at(Address address) { return at<CUstream_st>(address); }

class CudaRecords : public WatchedRecords {
 public:
  // `allocate` and `release`: see allocate_with().
  template <class... Watched>
  CudaRecords(py::object allocate, py::object release, const Watched&... watched)
      : WatchedRecords(watched...), allocate_(allocate_with(std::move(allocate), std::move(release))) {}

  ~CudaRecords() {
    devices_.clear();
    abandoned_blocks().give_back();
  }

  // (device, tensors, groups) of each device, in the order of the records. To be called once these are
  // filled.
  void divide(const std::vector<std::tuple<int, int64_t, int64_t>>& devices) {
    std::vector<std::unique_ptr<cuda::DeviceStep>> previous = std::move(devices_);
    devices_.clear();
    int64_t first_tensor = 0;
    int64_t first_group = 0;
    for (const auto& [device, tensors, groups] : devices) {
      std::unique_ptr<cuda::DeviceTable> table;
      for (auto& last : previous) {
        if (last != nullptr && last->device() == device) {
          table = last->take_table();
          last.reset();
        }
      }
      if (table == nullptr) {
        table = std::make_unique<cuda::DeviceTable>(device, allocate_);
      }
      const cuda::Part part = {device, first_tensor, tensors, first_group, groups};
      devices_.push_back(std::make_unique<cuda::DeviceStep>(records_, part, std::move(table), captured_));
      first_tensor += tensors;
      first_group += groups;
    }
  }

  // `index` counts the devices of divide(), here and below.
  void fill_state(size_t index, const py::bytes& block) {
    devices_.at(index)->state = records_in<StepState>(block).at(0);
  }

  void sum_of_squares(size_t index, Address out, Address stream) {
    devices_.at(index)->sum_of_squares(at<double>(out), stream_at(stream));
  }

  void prologue(size_t index, Address stream) { devices_.at(index)->prologue(stream_at(stream)); }

  // Where that has left a tensor's part, (0, 0) for nowhere: what others pass to take().
  std::pair<Address, Address> prepared(size_t index, size_t tensor, Address stream) const {
    const auto [header, coefficients] = devices_.at(index)->prepared(tensor, stream_at(stream));
    return {reinterpret_cast<Address>(header), reinterpret_cast<Address>(coefficients)};
  }

  // Lets the next step of these records, which are of one tensor, take over what is prepared.
  void take(Address header, Address coefficients) {
    devices_.at(0)->given = {at<cuda::Header>(header), at<cuda::CoefficientRow>(coefficients)};
  }

  void step(size_t index, Address grad_scale, Address found_inf, Address stream) {
    abandoned_blocks().give_back();
    const py::gil_scoped_release release;
    cuda::DeviceStep& device = *devices_.at(index);
    device.state.grad_scale = at<const float>(grad_scale);
    device.state.found_inf = at<const float>(found_inf);
    device.step(stream_at(stream));
  }

  void update_captured(size_t index, Address stream) {
    devices_.at(index)->update_captured(stream_at(stream));
  }

  // Whether a graph may have captured a step, and is there.
  bool has_captured() { return !captured_.empty(); }

 private:
  cuda::Allocate allocate_;
  cuda::CapturedTables captured_{allocate_};
  std::vector<std::unique_ptr<cuda::DeviceStep>> devices_;
};

void evaluate(int device, Address table, int64_t layers, int64_t rows, Address steps, int64_t count,
              Address out, Address stream) {
  const cuda::DeviceGuard guard(device);
  cuda::evaluate(at<const double>(table), layers, rows, at<const int64_t>(steps), count, at<double>(out),
                 stream_at(stream));
}

std::string missing_code(int device) {
  try {
    const cuda::DeviceGuard guard(device);
    return cuda::missing_code();
  } catch (const std::runtime_error& error) {  // no device can be had: of an old driver, for one
    return error.what();
  }
}

}  // namespace

void define_cuda(py::module_& m) {
  using release = py::call_guard<py::gil_scoped_release>;
  m.attr("cuda_architectures") = NEXUS_CUDA_ARCHS;
  m.def("cuda_missing_code", &missing_code,
        "Why the CUDA kernels cannot run on a device, or an empty string.");
  m.def("cuda_evaluate", &evaluate, release());
  py::class_<CudaRecords, WatchedRecords>(m, "CudaRecords", py::module_local(),
                                          py::custom_type_setup(collect_garbage))
      .def(constructor<py::object, py::object>())
      .def("divide", &CudaRecords::divide)
      .def("fill_state", &CudaRecords::fill_state)
      .def("sum_of_squares", &CudaRecords::sum_of_squares, release())
      .def("prologue", &CudaRecords::prologue, release())
      .def("prepared", &CudaRecords::prepared)
      .def("take", &CudaRecords::take)
      .def("step", &CudaRecords::step)
      .def("update_captured", &CudaRecords::update_captured, release())
      .def("has_captured", &CudaRecords::has_captured);
}

}  // namespace nexus

#endif  // NEXUS_CUDA
