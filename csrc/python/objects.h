// Python objects through the C API: references that count, and dicts.
#pragma once

#include <Python.h>

namespace nexus {

// A strong reference.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* borrowed) : pointer_(borrowed) { Py_XINCREF(pointer_); }
  Object(const Object& other) : Object(other.pointer_) {}
  Object(Object&& other) noexcept : pointer_(other.pointer_) { other.pointer_ = nullptr; }
  Object& operator=(Object other) noexcept {
    PyObject* mine = pointer_;
    pointer_ = other.pointer_;
    other.pointer_ = mine;
    return *this;
  }
  ~Object() { Py_XDECREF(pointer_); }
  PyObject* get() const { return pointer_; }

  // Takes over a new reference, such as most functions of the C API return.
  static Object own(PyObject* created) {
    Object object;
    object.pointer_ = created;
    return object;
  }

 private:
  PyObject* pointer_ = nullptr;
};

inline Object interned(const char* name) { return Object::own(PyUnicode_InternFromString(name)); }

// Borrowed; null where there is none. The keys are interned strings, whose hash is at hand.
inline PyObject* item(PyObject* dict, PyObject* key) {
  PyObject* value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) {
    PyErr_Clear();
  }
  return value;
}

}  // namespace nexus
