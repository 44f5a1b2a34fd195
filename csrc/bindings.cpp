// The Python module nexus._native: raw pointers and sizes in, nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/step.h"
#include "tensor_watch.h"

namespace py = pybind11;

namespace nexus {
namespace {

using Address = uintptr_t;  // of memory that the caller keeps alive; 0 is null

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (value, tensor, tensor dtype, table, rows, scale, last): the fields of Rate.
using RateFields = std::tuple<double, Address, int64_t, Address, int64_t, double, Address>;

Rate rate_of(const RateFields& fields) {
  const auto& [value, tensor, dtype, table, rows, scale, last] = fields;
  return {value, at<const void>(tensor), dtype, at<const double>(table), rows, scale, at<double>(last)};
}

class CpuTensorList {
 public:
  CpuTensorList(const py::dict& attributes, const py::tuple& setting_names, const py::object& grad_descriptor,
                const py::object& exchange_api, const py::tuple& dtypes)
      : watch_(list_, attributes.ptr(), setting_names.ptr(), grad_descriptor.ptr(),
               TensorReader(exchange_api.ptr(), dtypes.ptr())) {}

  void begin() {
    list_.tensors.clear();
    list_.groups.clear();
    watch_.reset();
  }

  // Begins the groups anew, their tensors staying as they are.
  void begin_groups() {
    list_.groups.clear();
    watch_.reset_settings();
  }

  void add_group(const RateFields& lr, const RateFields& weight_decay, double beta1, double beta2, double eps,
                 double max_grad_norm, bool maximize) {
    list_.groups.push_back({rate_of(lr), rate_of(weight_decay), beta1, beta2, eps, max_grad_norm, maximize});
  }

  int64_t add_tensor(Address param, Address exp_avg, Address exp_avg_sq, Address max_exp_avg_sq, Address step,
                     int64_t numel, int32_t group, int32_t param_dtype, int32_t grad_dtype) {
    list_.tensors.push_back({at<void>(param), nullptr, at<void>(exp_avg), at<void>(exp_avg_sq),
                             at<void>(max_exp_avg_sq), at<int64_t>(step), numel, group,
                             static_cast<DType>(param_dtype), static_cast<DType>(grad_dtype), 0});
    return static_cast<int64_t>(list_.tensors.size()) - 1;
  }

  void watch_parameter(const py::handle& param) { watch_.add_parameter(param.ptr()); }

  void watch_entry(const py::handle& param, int64_t record, const py::handle& streams, bool staged_param,
                   bool staged_grad, Address grad_buffer) {
    watch_.add_parameter(param.ptr(), record, streams.ptr(), staged_param, staged_grad,
                         at<void>(grad_buffer));
  }

  void watch_tensor(const py::handle& tensor) { watch_.add_tensor(tensor.ptr()); }

  void watch_setting_tensor(const py::handle& tensor) { watch_.add_setting_tensor(tensor.ptr()); }

  py::object written() const { return py::reinterpret_borrow<py::object>(watch_.written()); }

  TensorWatch& watch() { return watch_; }

  // Ends what begin() began; two tensors that share memory are returned by their indices.
  std::pair<int64_t, int64_t> end() {
    list_.divide();
    return list_.overlap();
  }

  void set_state(Address completed, Address skipped, Address sum_of_squares, Address grad_norm,
                 bool skip_nonfinite) {
    list_.state = {at<int64_t>(completed),
                   at<int64_t>(skipped),
                   at<const double>(sum_of_squares),
                   at<double>(grad_norm),
                   nullptr,
                   nullptr,
                   skip_nonfinite};
  }

  int refresh() { return static_cast<int>(watch_.refresh()); }

  void sum_of_squares(Address out, int threads) {
    py::gil_scoped_release release;
    *at<double>(out) = list_.sum_of_squares(threads);
  }

  void step(int threads, Address grad_scale, Address found_inf) {
    list_.state.grad_scale = at<const float>(grad_scale);
    list_.state.found_inf = at<const float>(found_inf);
    {
      py::gil_scoped_release release;
      list_.step(threads);
    }
    watch_.release_gradients();
  }

  void traffic(int threads) {
    if (!list_.traffic(threads)) {
      throw std::invalid_argument("only a list of float32 tensors without amsgrad can be measured");
    }
  }

  void use_instruction_set(const std::string& name) {
    const cpu::Kernels* kernels = cpu::kernels(name.c_str());
    if (kernels == nullptr) {
      throw std::invalid_argument("instruction set '" + name + "' is not available on this processor");
    }
    list_.kernels = kernels;
  }

 private:
  cpu::TensorList list_;
  TensorWatch watch_;
};

// Lets the garbage collector see what a CpuTensorList refers to.
CpuTensorList* constructed(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<CpuTensorList>() : nullptr;
}

void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    CpuTensorList* list = constructed(self);
    return list == nullptr ? 0 : list->watch().traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (CpuTensorList* list = constructed(self)) {
      list->watch().clear();
    }
    return 0;
  };
}

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

PYBIND11_MODULE(_native, m) {
  using nexus::CpuTensorList;
  m.doc() = "Kernels of nexus for the CPU. Addresses are those of memory that the caller keeps alive.";
  m.def("evaluate", &nexus::evaluate, py::arg("table"), py::arg("rows"), py::arg("steps"), py::arg("count"),
        py::arg("out"));
  m.def("instruction_sets", &nexus::instruction_sets, "What this processor can run, the best first.");
  m.def("thread_runtime", &nexus::cpu::thread_runtime, "The file name of the OpenMP runtime in use.");
  m.def("chunk", [](int64_t numel, int64_t index) {
    const nexus::Chunk chunk = nexus::chunk_at(numel, index, 0);
    return py::make_tuple(chunk.begin, chunk.count);
  });
  m.def("chunk_count", &nexus::chunk_count);
  py::class_<CpuTensorList>(m, "CpuTensorList", py::custom_type_setup(nexus::collect_garbage))
      .def(py::init<const py::dict&, const py::tuple&, const py::object&, const py::object&,
                    const py::tuple&>())
      .def("begin", &CpuTensorList::begin)
      .def("begin_groups", &CpuTensorList::begin_groups)
      .def("add_group", &CpuTensorList::add_group)
      .def("add_tensor", &CpuTensorList::add_tensor)
      .def("watch_parameter", &CpuTensorList::watch_parameter)
      .def("watch_entry", &CpuTensorList::watch_entry)
      .def("watch_tensor", &CpuTensorList::watch_tensor)
      .def("watch_setting_tensor", &CpuTensorList::watch_setting_tensor)
      .def("written", &CpuTensorList::written, "The parameters that the next step writes to in place.")
      .def("end", &CpuTensorList::end)
      .def("set_state", &CpuTensorList::set_state)
      .def("refresh", &CpuTensorList::refresh)
      .def("sum_of_squares", &CpuTensorList::sum_of_squares)
      .def("step", &CpuTensorList::step)
      .def("traffic", &CpuTensorList::traffic, "The loads and stores of step() alone; no value changes.",
           py::call_guard<py::gil_scoped_release>())
      .def("use_instruction_set", &CpuTensorList::use_instruction_set);
}
