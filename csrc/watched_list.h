// What the Python classes of every backend share: a list of tensors that is watched.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "tensor_watch.h"

namespace nexus {

namespace py = pybind11;

using Address = uintptr_t;  // of memory that the caller keeps alive; 0 is null

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (value, tensor, tensor dtype, table, rows, scale, last): the fields of Rate.
using RateFields = std::tuple<double, Address, int64_t, Address, int64_t, double, Address>;

inline Rate rate_of(const RateFields& fields) {
  const auto& [value, tensor, dtype, table, rows, scale, last] = fields;
  return {value, at<const void>(tensor), dtype, at<const double>(table), rows, scale, at<double>(last)};
}

// (count, rows, slots, width): the fields of History.
using HistoryFields = std::tuple<Address, Address, int64_t, int64_t>;

// (completed, skipped, sum_of_squares, grad_norm, skip_nonfinite, history): the fields of StepState that
// outlive a step.
using StateFields = std::tuple<Address, Address, Address, Address, bool, HistoryFields>;

inline StepState state_of(const StateFields& fields) {
  const auto& [completed, skipped, sum_of_squares, grad_norm, skip_nonfinite, history] = fields;
  const auto& [count, rows, slots, width] = history;
  return {at<int64_t>(completed),
          at<int64_t>(skipped),
          at<const double>(sum_of_squares),
          at<double>(grad_norm),
          nullptr,
          nullptr,
          skip_nonfinite,
          {at<int64_t>(count), at<double>(rows), slots, width}};
}

// What the lists of all devices have in common: tensors and hyperparameters, watched.
class WatchedList {
 public:
  // For `state_names`, `storage_references`, `count_users` and `storage_users` see StateWatch.
  WatchedList(const py::tuple& setting_names, const py::tuple& state_names, int64_t storage_references,
              const py::object& count_users, int64_t storage_users, const py::object& grad_descriptor,
              const py::object& exchange_api, const py::tuple& dtypes)
      : WatchedList(setting_names, state_names, storage_references, count_users, storage_users,
                    grad_descriptor, TensorReader(exchange_api.ptr(), dtypes.ptr())) {}

  // `attributes`: the optimizer's __dict__.
  void begin(const py::dict& attributes) {
    list_.tensors.clear();
    list_.groups.clear();
    watch_.reset(attributes.ptr());
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
                             at<void>(max_exp_avg_sq), at<double>(step), numel, group,
                             static_cast<DType>(param_dtype), static_cast<DType>(grad_dtype), 0});
    return static_cast<int64_t>(list_.tensors.size()) - 1;
  }

  void watch_parameter(const py::handle& param) { watch_.add_parameter(param.ptr()); }

  void watch_entry(const py::handle& param, int64_t record, const py::handle& streams, bool staged_param,
                   bool staged_grad, Address grad_buffer, const py::handle& placements) {
    watch_.add_parameter(param.ptr(), record, streams.ptr(), staged_param, staged_grad, at<void>(grad_buffer),
                         placements.ptr());
  }

  void watch_tensor(const py::handle& tensor) { watch_.add_tensor(tensor.ptr()); }

  void watch_setting_tensor(const py::handle& tensor, bool written_by_steps) {
    watch_.add_setting_tensor(tensor.ptr(), written_by_steps);
  }

  py::object written() const { return py::reinterpret_borrow<py::object>(watch_.written()); }

  TensorWatch& watch() { return watch_; }

  int refresh(const py::dict& attributes) { return static_cast<int>(watch_.refresh(attributes.ptr())); }

  void release_state() { watch_.release_state(); }

  void release_gradients() { watch_.release_gradients(); }

  // Two tensors with a gradient that share memory, by their indices, or (-1, -1).
  std::pair<int64_t, int64_t> overlap() const { return list_.overlap(); }

  // Where tensors and their gradients are, as refresh() has found them: pairs of addresses, in order.
  void write_pointers(Address out) const {
    Address* to = at<Address>(out);
    for (const TensorRecord& tensor : list_.tensors) {
      *to++ = reinterpret_cast<Address>(tensor.param);
      *to++ = reinterpret_cast<Address>(tensor.grad);
    }
  }

  // The float rates of all groups, some of which refresh() may have taken over.
  std::vector<double> rates() const {
    std::vector<double> values;
    for (const Group& group : list_.groups) {
      values.push_back(group.lr.value);
    }
    return values;
  }

 private:
  WatchedList(const py::tuple& setting_names, const py::tuple& state_names, int64_t storage_references,
              const py::object& count_users, int64_t storage_users, const py::object& grad_descriptor,
              const TensorReader& reader)
      : watch_(list_, setting_names.ptr(),
               StateWatch(state_names.ptr(), storage_references, count_users.ptr(), storage_users, reader),
               grad_descriptor.ptr(), reader) {}

 protected:
  HostList list_;
  TensorWatch watch_;
};

// Lets the garbage collector see what a list refers to.
inline WatchedList* constructed(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<WatchedList>() : nullptr;
}

inline void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    WatchedList* list = constructed(self);
    return list == nullptr ? 0 : list->watch().traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (WatchedList* list = constructed(self)) {
      list->watch().clear();
    }
    return 0;
  };
}

}  // namespace nexus
