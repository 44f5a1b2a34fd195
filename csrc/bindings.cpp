// The Python module nexus._native: raw pointers and sizes in, nothing of torch.
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/step.h"
#include "watched_list.h"

namespace nexus {

#ifdef NEXUS_CUDA
void define_cuda(py::module_& m);  // cuda_bindings.cpp
#endif

namespace {

class CpuTensorList : public WatchedList {
 public:
  using WatchedList::WatchedList;

  // To be called once all tensors are added.
  void divide() { step_.divide(); }

  void set_state(const StateFields& fields) { step_.state = state_of(fields); }

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
    watch_.release_gradients();
  }

  void use_instruction_set(const std::string& name) {
    const cpu::Kernels* kernels = cpu::kernels(name.c_str());
    if (kernels == nullptr) {
      throw std::invalid_argument("instruction set '" + name + "' is not available on this processor");
    }
    step_.kernels = kernels;
  }

 private:
  cpu::Step step_{list_};
};

std::vector<std::string> instruction_sets() {
  std::vector<std::string> available;
  for (const char* name : {"avx512", "avx2", "baseline"}) {
    if (cpu::kernels(name) != nullptr) {
      available.emplace_back(name);
    }
  }
  return available;
}

void evaluate(Address table, int64_t rows, Address steps, int64_t count, Address out) {
  py::gil_scoped_release release;
  for (int64_t i = 0; i < count; ++i) {
    at<double>(out)[i] = evaluate_schedule(at<const double>(table), rows, at<const int64_t>(steps)[i]);
  }
}

}  // namespace
}  // namespace nexus

#ifndef NEXUS_MODULE
#define NEXUS_MODULE _native
#endif

PYBIND11_MODULE(NEXUS_MODULE, m) {
  namespace py = pybind11;
  using nexus::CpuTensorList;
  using nexus::WatchedList;
  m.doc() = "Kernels of nexus. Addresses are those of memory that the caller keeps alive.";
  m.def("evaluate", &nexus::evaluate, py::arg("table"), py::arg("rows"), py::arg("steps"), py::arg("count"),
        py::arg("out"));
  m.def("instruction_sets", &nexus::instruction_sets, "What this processor can run, the best first.");
  m.def("thread_runtime", &nexus::cpu::thread_runtime, "The file name of the OpenMP runtime in use.");
  m.def("chunk", [](int64_t numel, int64_t index) {
    const nexus::Chunk chunk = nexus::chunk_at(numel, index, 0);
    return std::pair(chunk.begin, static_cast<int64_t>(chunk.count));
  });
  m.def("chunk_count", &nexus::chunk_count);
  py::class_<WatchedList>(m, "WatchedList", py::module_local(), py::custom_type_setup(nexus::collect_garbage))
      .def(py::init<py::tuple, py::tuple, int64_t, py::object, int64_t, py::object, py::object, py::tuple>())
      .def("begin", &WatchedList::begin)
      .def("begin_groups", &WatchedList::begin_groups)
      .def("add_group", &WatchedList::add_group)
      .def("add_tensor", &WatchedList::add_tensor)
      .def("watch_parameter", &WatchedList::watch_parameter)
      .def("watch_entry", &WatchedList::watch_entry, py::arg("param"), py::arg("record"), py::arg("streams"),
           py::arg("staged_param"), py::arg("staged_grad"), py::arg("grad_buffer"),
           py::arg("placements") = py::none())
      .def("watch_tensor", &WatchedList::watch_tensor)
      .def("watch_setting_tensor", &WatchedList::watch_setting_tensor)
      .def("written", &WatchedList::written, "The parameters that the next step writes to in place.")
      .def("overlap", &WatchedList::overlap)
      .def("refresh", &WatchedList::refresh)
      .def("release_state", &WatchedList::release_state)
      .def("release_gradients", &WatchedList::release_gradients)
      .def("write_pointers", &WatchedList::write_pointers)
      .def("rates", &WatchedList::rates);
  py::class_<CpuTensorList, WatchedList>(m, "CpuTensorList", py::module_local(),
                                         py::custom_type_setup(nexus::collect_garbage))
      .def(py::init<py::tuple, py::tuple, int64_t, py::object, int64_t, py::object, py::object, py::tuple>())
      .def("divide", &CpuTensorList::divide)
      .def("set_state", &CpuTensorList::set_state)
      .def("sum_of_squares", &CpuTensorList::sum_of_squares)
      .def("step", &CpuTensorList::step)
      .def("use_instruction_set", &CpuTensorList::use_instruction_set);
#ifdef NEXUS_CUDA
  nexus::define_cuda(m);
#endif
}
