// What crosses between Python and the classes of the module.
#pragma once

#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "watch.h"

namespace nexus {

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

// That of WatchedRecords, which its kinds have, too, after `First`.
template <class... First>
auto constructor() {
  return py::init<First..., py::tuple, py::list, py::tuple, int64_t, py::object, int64_t, py::object,
                  py::object, py::tuple>();
}

// Lets the garbage collector see what watched records refer to.
inline WatchedRecords* constructed(PyObject* self) {
  auto holder = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
  return holder.holder_constructed() ? holder.value_ptr<WatchedRecords>() : nullptr;
}

inline void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
    Py_VISIT(Py_TYPE(self));
    WatchedRecords* records = constructed(self);
    return records == nullptr ? 0 : records->traverse(visit, arg);
  };
  type->tp_clear = [](PyObject* self) {
    if (WatchedRecords* records = constructed(self)) {
      records->clear();
    }
    return 0;
  };
}

}  // namespace nexus
