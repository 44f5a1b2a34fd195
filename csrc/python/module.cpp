// The Python module nexus._native: raw pointers and sizes in, nothing of torch.
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/parallel.h"
#include "../cpu/step.h"
#include "binding.h"
#include "glance.h"
#include "overlap.h"

namespace nexus {

#ifdef NEXUS_CUDA
void define_cuda(py::module_& m);  // cuda_module.cpp
#endif

namespace {

class CpuRecords : public WatchedRecords {
 public:
  using WatchedRecords::WatchedRecords;

  // To be called once the tensors' records are filled.
  void divide() { step_.divide(); }

  void fill_state(const py::bytes& block) { step_.state = records_in<StepState>(block).at(0); }

  void sum_of_squares(Address out, int threads) {
    py::gil_scoped_release release;
    *at<double>(out) = step_.sum_of_squares(threads);
  }

  void step(int threads, Address grad_scale, Address found_inf) {
    step_.state.grad_scale = at<const float>(grad_scale);
    step_.state.found_inf = at<const float>(found_inf);
    {
      py::gil_scoped_release release;
      step_.run(threads);
    }
    release_gradients();
  }

  void use_instruction_set(const std::string& name) {
    const cpu::Kernels* kernels = cpu::kernels(name.c_str());
    if (kernels == nullptr) {
      throw std::invalid_argument("instruction set '" + name + "' is not available on this processor");
    }
    step_.kernels = kernels;
  }

 private:
  cpu::Step step_{records_};
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> available;
  for (const char* name : {"avx512", "avx2", "neon", "baseline"}) {
    if (cpu::kernels(name) != nullptr) {
      available.emplace_back(name);
    }
  }
  return available;
}

void evaluate(Address table, int64_t layers, int64_t rows, Address steps, int64_t count, Address out) {
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    at<double>(out)[i] =
        evaluate_schedule(at<const double>(table), layers, rows, at<const int64_t>(steps)[i]);
  }
}

// Tells Python a record's size and fields: names and formats, in order.
template <class Record>
void describe_record(py::dict& records) {
  py::list fields;
  for (const Field& field : Fields<Record>::kFields) {
    fields.append(py::make_tuple(field.name, std::string(1, field.format)));
  }
  records[Fields<Record>::kName] = py::make_tuple(sizeof(Record), py::tuple(fields));
}

py::dict describe_records() {
  py::dict records;
  describe_record<TensorRecord>(records);
  describe_record<Rate>(records);
  describe_record<Group>(records);
  describe_record<History>(records);
  describe_record<StepState>(records);
  return records;
}

}  // namespace
}  // namespace nexus

#ifndef NEXUS_MODULE
#define NEXUS_MODULE _native
#endif

PYBIND11_MODULE(NEXUS_MODULE, m) {
  namespace py = pybind11;
  using nexus::CpuRecords;
  using nexus::WatchedRecords;
  m.doc() = "Kernels of nexus. Addresses are those of memory that the caller keeps alive.";
  m.def("evaluate", &nexus::evaluate, py::arg("table"), py::arg("layers"), py::arg("rows"), py::arg("steps"),
        py::arg("count"), py::arg("out"));
  m.def("instruction_sets", &nexus::instruction_sets, "What this processor can run, the best first.");
  m.def("thread_runtime", &nexus::cpu::thread_runtime, "The file name of the OpenMP runtime in use.");
  m.attr("records") = nexus::describe_records();
  m.def("chunk", [](int64_t numel, int64_t index) {
    const nexus::Chunk chunk = nexus::chunk_at(numel, index, 0);
    return std::pair(chunk.begin, static_cast<int64_t>(chunk.count));
  });
  m.def("chunk_count", &nexus::chunk_count);
  py::class_<nexus::Glance>(m, "Glance", py::module_local())
      .def("remember", &nexus::Glance::remember)
      .def("same", &nexus::Glance::same);
  py::class_<WatchedRecords>(m, "WatchedRecords", py::module_local(),
                             py::custom_type_setup(nexus::collect_garbage))
      .def(nexus::constructor())
      .def("begin", &WatchedRecords::begin)
      .def("fill_groups", &WatchedRecords::fill_groups)
      .def("fill_tensors", &WatchedRecords::fill_tensors)
      .def("groups", [](const WatchedRecords& self) { return nexus::memory_of(self.records().groups); })
      .def("tensors", [](const WatchedRecords& self) { return nexus::memory_of(self.records().tensors); })
      .def("watch_parameter", &WatchedRecords::watch_parameter)
      .def("watch_entry", &WatchedRecords::watch_entry, py::arg("param"), py::arg("record"),
           py::arg("streams"), py::arg("staged_param"), py::arg("staged_grad"), py::arg("grad_buffer"),
           py::arg("placements") = py::none())
      .def("watch_tensor", &WatchedRecords::watch_tensor)
      .def("watch_setting_tensor", &WatchedRecords::watch_setting_tensor)
      .def("written", &WatchedRecords::written, "The parameters that the next step writes to in place.")
      .def(
          "glance", [](const WatchedRecords& self) { return nexus::Glance(self); }, py::keep_alive<0, 1>())
      .def(
          "overlap", [](const WatchedRecords& self) { return nexus::overlap(self.records().tensors); },
          "Two tensors with a gradient that share memory, by their indices, or (-1, -1).")
      .def("refresh", &WatchedRecords::refresh)
      .def("release_state", &WatchedRecords::release_state)
      .def("release_gradients", &WatchedRecords::release_gradients);
  py::class_<CpuRecords, WatchedRecords>(m, "CpuRecords", py::module_local(),
                                         py::custom_type_setup(nexus::collect_garbage))
      .def(nexus::constructor())
      .def("divide", &CpuRecords::divide)
      .def("fill_state", &CpuRecords::fill_state)
      .def("sum_of_squares", &CpuRecords::sum_of_squares)
      .def("step", &CpuRecords::step)
      .def("use_instruction_set", &CpuRecords::use_instruction_set);
#ifdef NEXUS_CUDA
  nexus::define_cuda(m);
#endif
}
