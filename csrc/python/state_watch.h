// Notices what became of the tensors in `optimizer.state`. Looking at three tensors of each parameter would
// cost half as much again as all the rest of a step's checks, so they are looked at only where somebody may
// have touched them since: whoever reads `optimizer.state` has it released, and whoever has got hold of
// something in there before, and keeps it, is seen by its reference count.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "reader.h"

namespace nexus {

class StateWatch {
 public:
  // `names`: the keys of a parameter's state whose tensors a step uses; other keys are the user's.
  // `storage_references`: how many torch itself holds to the Python object of a storage, of which there is
  // one.
  StateWatch(PyObject* names, int64_t storage_references, PyObject* count_users, int64_t storage_users,
             Reader reader);

  // Takes the state as it is now for what is expected from here on. `attributes`: the optimizer's __dict__.
  void reset(PyObject* attributes);

  // Whether every tensor is there, and where it was.
  bool same(PyObject* attributes);

  // Lets go of everything until the next same(), so that what is taken out of the state is freed at once.
  void release();

  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  // An object that is held on to, but for the time after release(): then its address alone is known.
  class Loose {
   public:
    explicit Loose(PyObject* borrowed) : address_(borrowed), held_(borrowed) {}
    PyObject* address() const { return address_; }
    PyObject* held() const { return held_.get(); }  // null after release()
    // Whether `now`, which is alive, is at the address; it is held from here on.
    bool hold(PyObject* now);
    Object release() { return std::exchange(held_, Object()); }

   private:
    PyObject* address_;
    Object held_;
  };
  struct StateTensor {
    Loose value;  // null: there was none
    bool is_tensor;
    bool spread;  // whether that is a DTensor
    Object part;  // of a DTensor: the tensor that is its part in this process
    Object storage;
    void* data;
    DType dtype;
    size_t layout;  // in layouts_: the number of dimensions, the shape, the strides
  };
  // What there was for one parameter, under each of the names.
  struct Entry {
    Loose key;
    Loose entries;
    std::vector<StateTensor> tensors;
  };

  bool same_entry(Entry& entry);
  bool same_tensor(StateTensor& tensor);
  bool is_in_use(const Entry& entry) const;
  bool has_other_users(PyObject* storage) const;
  bool has_state(PyObject* key, PyObject* entries) const;
  void add(PyObject* key, PyObject* entries);
  PyObject* name(size_t index) const {
    return PyTuple_GET_ITEM(names_.get(), static_cast<Py_ssize_t>(index));
  }
  size_t name_count() const { return static_cast<size_t>(PyTuple_GET_SIZE(names_.get())); }

  Object names_;
  int64_t storage_references_;
  Object count_users_;
  int64_t storage_users_;
  Reader reader_;
  Object state_name_, local_tensor_name_, storage_name_;

  Loose seen_{nullptr};
  bool is_held_ = false;   // false from release() to the next same()
  bool is_known_ = false;  // whether same() has looked at all of it, and nobody has the state itself
  std::vector<Entry> entries_;
  std::vector<int64_t> layouts_;
  std::vector<size_t> in_use_;  // of entries_: those that others refer to, and may change unseen
};

}  // namespace nexus
