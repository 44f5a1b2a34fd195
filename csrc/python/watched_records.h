// What the Python classes of every backend share: a list of tensors that is watched.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "overlap.h"
#include "watch.h"

namespace nexus {

namespace py = pybind11;

using Address = uintptr_t;  // of memory that the caller keeps alive; 0 is null

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The records in a block that Python has filled.
template <class Record>
std::vector<Record> records_in(const std::string& block) {
  std::vector<Record> records(block.size() / sizeof(Record));
  memcpy(records.data(), block.data(), records.size() * sizeof(Record));
  return records;
}

// The memory of records, to be read as long as nobody fills them anew.
template <class Record>
py::memoryview memory_of(const std::vector<Record>& records) {
  return py::memoryview::from_memory(static_cast<const void*>(records.data()),
                                     static_cast<py::ssize_t>(records.size() * sizeof(Record)));
}

// What the lists of all devices have in common: tensors and hyperparameters, watched.
class WatchedRecords {
 public:
  // For `state_names`, `storage_references`, `count_users` and `storage_users` see StateWatch.
  WatchedRecords(const py::tuple& setting_names, const py::tuple& state_names, int64_t storage_references,
                 const py::object& count_users, int64_t storage_users, const py::object& grad_descriptor,
                 const py::object& exchange_api, const py::tuple& dtypes)
      : WatchedRecords(setting_names, state_names, storage_references, count_users, storage_users,
                       grad_descriptor, Reader(exchange_api.ptr(), dtypes.ptr())) {}

  // `attributes`: the optimizer's __dict__.
  void begin(const py::dict& attributes) {
    records_.tensors.clear();
    records_.groups.clear();
    watch_.reset(attributes.ptr());
  }

  // Every group, once for each device, device by device. Takes the hyperparameters as they are now for what
  // is expected from here on.
  void fill_groups(const py::bytes& block) {
    records_.groups = records_in<Group>(block);
    watch_.reset_settings();
  }

  // Device by device. Where the gradients are, refresh() fills in.
  void fill_tensors(const py::bytes& block) { records_.tensors = records_in<TensorRecord>(block); }

  // As refresh() has left them.
  py::memoryview groups() const { return memory_of(records_.groups); }
  py::memoryview tensors() const { return memory_of(records_.tensors); }

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

  Watch& watch() { return watch_; }

  int refresh(const py::dict& attributes) { return static_cast<int>(watch_.refresh(attributes.ptr())); }

  void release_state() { watch_.release_state(); }

  void release_gradients() { watch_.release_gradients(); }

  // Two tensors with a gradient that share memory, by their indices, or (-1, -1).
  std::pair<int64_t, int64_t> overlap() const { return nexus::overlap(records_.tensors); }

 private:
  WatchedRecords(const py::tuple& setting_names, const py::tuple& state_names, int64_t storage_references,
                 const py::object& count_users, int64_t storage_users, const py::object& grad_descriptor,
                 const Reader& reader)
      : watch_(records_, setting_names.ptr(),
               StateWatch(state_names.ptr(), storage_references, count_users.ptr(), storage_users, reader),
               grad_descriptor.ptr(), reader) {}

 protected:
  Records records_;
  Watch watch_;
};

// Lets the garbage collector see what a list refers to.
inline WatchedRecords* constructed(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<WatchedRecords>() : nullptr;
}

inline void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    WatchedRecords* list = constructed(self);
    return list == nullptr ? 0 : list->watch().traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (WatchedRecords* list = constructed(self)) {
      list->watch().clear();
    }
    return 0;
  };
}

}  // namespace nexus
