#include "state_watch.h"

#include <utility>

namespace nexus {
namespace {

constexpr Py_ssize_t kOwnReferences = 2;  // the owner's, and that of this watch

bool is_used(PyObject* object, Py_ssize_t own) { return object != nullptr && Py_REFCNT(object) > own; }

}  // namespace

StateWatch::StateWatch(PyObject* names, int64_t storage_references, PyObject* count_users,
                       int64_t storage_users, Reader reader)
    : names_(names),
      storage_references_(storage_references),
      count_users_(count_users),
      storage_users_(storage_users),
      reader_(std::move(reader)),
      state_name_(interned("state")),
      local_tensor_name_(interned("_local_tensor")),
      storage_name_(interned("untyped_storage")) {}

void StateWatch::reset(PyObject* attributes) {
  const auto last = std::exchange(entries_, {});  // until the end: what dies may call back
  layouts_.clear();
  PyObject* state = item(attributes, state_name_.get());
  seen_ = Loose(state);
  PyObject *key, *entries;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &entries);) {
    if (has_state(key, entries)) {
      add(key, entries);
    }
  }
  is_held_ = true;
  is_known_ = false;  // the next same() looks at all of it
}

// Under a string or a number, there is something of a wrapper's.
bool StateWatch::has_state(PyObject* key, PyObject* entries) const {
  if (PyDict_Check(entries) && !PyUnicode_Check(key) && !PyLong_Check(key)) {
    for (size_t i = 0; i < name_count(); ++i) {
      if (item(entries, name(i)) != nullptr) {
        return true;
      }
    }
  }
  return false;
}

void StateWatch::add(PyObject* key, PyObject* entries) {
  Entry entry{Loose(key), Loose(entries), {}};
  Description now;
  for (size_t i = 0; i < name_count(); ++i) {
    PyObject* value = item(entries, name(i));
    StateTensor tensor{Loose(value), false, false, {}, {}, nullptr, DType::kOther, layouts_.size()};
    if (value != nullptr) {
      tensor.spread = PyObject_HasAttr(value, local_tensor_name_.get()) != 0;
      if (tensor.spread) {
        tensor.part = Object::own(PyObject_GetAttr(value, local_tensor_name_.get()));
      }
      tensor.is_tensor = reader_.describe(tensor.spread ? tensor.part.get() : value, now);
    }
    if (tensor.is_tensor) {
      tensor.data = now.data;
      tensor.dtype = now.dtype;
      layouts_.push_back(now.ndim);
      layouts_.insert(layouts_.end(), now.shape, now.shape + now.ndim);
      layouts_.insert(layouts_.end(), now.strides, now.strides + now.ndim);
    }
    entry.tensors.push_back(std::move(tensor));
  }
  entries_.push_back(std::move(entry));
}

bool StateWatch::Loose::hold(PyObject* now) {
  if (now != address_) {
    return false;
  }
  if (held_.get() == nullptr) {
    held_ = Object(now);
  }
  return true;
}

void StateWatch::release() {
  if (!is_held_) {
    return;
  }
  is_held_ = false;
  std::vector<Object> released;  // together, at the end: what dies may call back
  for (Entry& entry : entries_) {
    released.push_back(entry.key.release());
    released.push_back(entry.entries.release());
    for (StateTensor& tensor : entry.tensors) {
      released.push_back(tensor.value.release());
      released.push_back(std::exchange(tensor.part, Object()));
      released.push_back(std::exchange(tensor.storage, Object()));
    }
  }
  released.push_back(seen_.release());
}

bool StateWatch::same(PyObject* attributes) {
  PyObject* state = item(attributes, state_name_.get());
  if (state == nullptr || state != seen_.address()) {
    return false;
  }
  if (is_held_ && is_known_ && Py_REFCNT(state) <= kOwnReferences) {
    for (size_t i : in_use_) {
      if (!same_entry(entries_[i])) {
        is_known_ = false;
        return false;
      }
    }
    return true;
  }
  seen_.hold(state);
  is_held_ = true;
  is_known_ = false;
  in_use_.clear();
  PyObject *key, *entries;
  size_t i = 0;
  for (Py_ssize_t at = 0; PyDict_Next(state, &at, &key, &entries);) {
    if (!has_state(key, entries)) {
      continue;
    }
    if (i == entries_.size()) {
      return false;
    }
    Entry& entry = entries_[i];
    if (!entry.key.hold(key) || !entry.entries.hold(entries) || !same_entry(entry)) {
      return false;
    }
    if (is_in_use(entry)) {
      in_use_.push_back(i);
    }
    ++i;
  }
  // Whoever has the state may take out of it what was of nobody's a moment ago.
  is_known_ = i == entries_.size() && Py_REFCNT(state) <= kOwnReferences;
  return i == entries_.size();
}

bool StateWatch::same_entry(Entry& entry) {
  for (size_t i = 0; i < entry.tensors.size(); ++i) {
    StateTensor& tensor = entry.tensors[i];
    PyObject* value = item(entry.entries.address(), name(i));
    if (value != tensor.value.address() || (value != nullptr && !same_tensor(tensor))) {
      return false;
    }
  }
  return true;
}

bool StateWatch::same_tensor(StateTensor& tensor) {
  PyObject* value = tensor.value.address();
  tensor.value.hold(value);
  if (!tensor.is_tensor) {
    return true;
  }
  if (tensor.spread) {
    tensor.part = Object::own(PyObject_GetAttr(value, local_tensor_name_.get()));
    value = tensor.part.get();
  }
  Description now;
  if (value == nullptr || !reader_.describe(value, now) || now.data != tensor.data ||
      now.dtype != tensor.dtype || now.ndim != layouts_[tensor.layout]) {
    PyErr_Clear();
    return false;
  }
  const int64_t* shape = layouts_.data() + tensor.layout + 1;
  for (int d = 0; d < now.ndim; ++d) {
    if (now.shape[d] != shape[d] || now.strides[d] != shape[now.ndim + d]) {
      return false;
    }
  }
  if (tensor.storage.get() == nullptr) {
    tensor.storage = Object::own(PyObject_CallMethodNoArgs(value, storage_name_.get()));
    PyErr_Clear();
  }
  return true;
}

// Another tensor over the same memory, such as detach() makes, can have it moved.
bool StateWatch::has_other_users(PyObject* storage) const {
  if (storage == nullptr) {
    return false;
  }
  const Object count = Object::own(PyObject_CallOneArg(count_users_.get(), storage));
  const bool others = count.get() == nullptr || PyLong_AsLongLong(count.get()) > storage_users_;
  PyErr_Clear();
  return others;
}

// Whether anybody but the optimizer and this watch refers to the entry's dict, tensors or their storages.
bool StateWatch::is_in_use(const Entry& entry) const {
  if (is_used(entry.entries.address(), kOwnReferences)) {
    return true;
  }
  for (const StateTensor& tensor : entry.tensors) {
    if (is_used(tensor.value.address(), kOwnReferences) || is_used(tensor.part.get(), kOwnReferences) ||
        is_used(tensor.storage.get(), storage_references_ + 1) || has_other_users(tensor.storage.get())) {
      return true;
    }
  }
  return false;
}

int StateWatch::traverse(visitproc visit, void* arg) const {
  Py_VISIT(seen_.held());
  for (const Entry& entry : entries_) {
    Py_VISIT(entry.key.held());
    Py_VISIT(entry.entries.held());
    for (const StateTensor& tensor : entry.tensors) {
      Py_VISIT(tensor.value.held());
      Py_VISIT(tensor.part.get());
      Py_VISIT(tensor.storage.get());
    }
  }
  return 0;
}

void StateWatch::clear() {
  const auto entries = std::exchange(entries_, {});
  const Loose seen = std::exchange(seen_, Loose(nullptr));
}

}  // namespace nexus
