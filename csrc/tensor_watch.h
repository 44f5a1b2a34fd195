// Notices, once a step, whatever a user changed since the pointers were read: a gradient that moved, appeared
// or went away, a parameter whose storage was swapped, a replaced moment, an added group, another
// hyperparameter.
//
// Reads Python objects through the C API of CPython and tensors through DLPack's C exchange functions, which
// torch publishes on its tensor type: a stable interface, so that this needs no header of torch, at 20 ns for
// a Tensor and 50 for a Parameter. Where torch is too old to have them, the same is read through Python
// attributes. (A handle of torch's C shim reads a Parameter in 15 ns, but counts as a reference to it, which
// torch.utils.swap_tensors does not allow.)
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "host_list.h"

namespace nexus {

// Ordered: a higher value asks for more.
enum class Change { kNone = 0, kSettings = 1, kTensors = 2 };

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

// What a tensor is at this moment. `shape` and `strides` point into the tensor, or into the reader's scratch.
struct Description {
  void* data;
  DType dtype;
  int64_t device;  // equal numbers are one device
  int ndim;
  const int64_t* shape;
  const int64_t* strides;
};

class TensorReader {
 public:
  // `exchange_api`: torch.Tensor.__dlpack_c_exchange_api__, or None. `dtypes`: torch's four types, in the
  // order of DType.
  TensorReader(PyObject* exchange_api, PyObject* dtypes);

  // False where the tensor is none that a kernel could take; no Python error is left behind.
  bool describe(PyObject* tensor, Description& out);

  // Its type alone; also of a tensor that has no memory of its own.
  DType dtype(PyObject* tensor) const;

 private:
  bool describe_by_attributes(PyObject* tensor, Description& out);
  bool read_tuple(Object tuple, std::vector<int64_t>& out);
  DType index_of(PyObject* dtype) const;

  int (*exchange_)(void* tensor, void* dltensor) = nullptr;
  Object dtypes_;
  Object data_ptr_, dtype_, is_cpu_, get_device_, shape_, stride_;
  std::vector<int64_t> shape_scratch_, stride_scratch_;
};

class TensorWatch {
 public:
  // `attributes`: the optimizer's __dict__. `setting_names`: the keys of a group whose values are watched;
  // the first is "lr". `grad_descriptor`: torch's getter of Tensor.grad.
  TensorWatch(HostList& list, PyObject* attributes, PyObject* setting_names, PyObject* grad_descriptor,
              TensorReader reader);

  // Forgets everything, and takes groups and state as they are now for what is expected from here on.
  void reset();

  // Takes the groups' hyperparameters as they are now for what is expected from here on.
  void reset_settings();

  // The next parameter, in the order of the groups, and one that has never had a gradient.
  void add_parameter(PyObject* param);

  // The next parameter, which is tensor `record` of the list. `streams` is a tensor that is laid out as the
  // record's streams are: a gradient has to be as well, or is copied to `grad_buffer` by the caller.
  // `placements` are a DTensor's, whose part in this process is what is watched, and whose gradient has to
  // have them too, or is copied; None for any other tensor.
  void add_parameter(PyObject* param, int64_t record, PyObject* streams, bool staged_param, bool staged_grad,
                     void* grad_buffer, PyObject* placements);

  // A tensor whose memory must stay where it is.
  void add_tensor(PyObject* tensor);

  // The same, of a group's hyperparameters.
  void add_setting_tensor(PyObject* tensor);

  // Brings the list's pointers up to date and says what else there is to do. A float written to a group's
  // "lr" is taken over here; any other setting is the caller's.
  Change refresh();

  // Lets go of the gradients that refresh() has found: they are held until the step that reads them is over,
  // whatever another thread does to them meanwhile.
  void release_gradients();

  // Aliases of the parameters that the next step writes to where they are: a tuple; borrowed.
  PyObject* written() const { return written_.get(); }

  // For the garbage collector: the optimizer's __dict__ owns this watch, which refers to that dict.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  struct Parameter {
    Object tensor;
    Object
        alias;  // tensor.detach(): shares its version counter, and costs less to read, being a plain Tensor
    int64_t record;  // -1: none
    bool staged_param;
    bool staged_grad;
    DType dtype;
    DType grad_dtype;
    int64_t device;
    int32_t ndim;
    size_t layout;  // in layouts_: the shape, the parameter's strides, the gradient's strides
    void* grad_buffer;
    Object placements;  // null: no DTensor
    Object grad;        // between refresh() and release_gradients()
  };
  struct GroupSnapshot {
    Object group;
    Object params;
    Py_ssize_t count;
    std::vector<Object> settings;
    uint64_t version;  // of `group` when its settings were last compared
  };
  struct StateSnapshot {
    Object key;
    Object entries;
    std::vector<Object> values;
    uint64_t version;  // of `entries` when its values were last compared
  };
  struct FixedTensor {
    Object tensor;
    void* data;
  };

  bool same_groups();
  Change same_settings();
  bool same_state();
  bool in_place(const std::vector<FixedTensor>& tensors);
  bool refresh_parameter(Parameter& parameter);
  bool same_layout(const Parameter& parameter, const Description& now, const int64_t* strides) const;
  void list_written();
  FixedTensor fixed(PyObject* tensor);
  Object gradient(PyObject* param);
  Object local_part(PyObject* tensor, PyObject* placements) const;
  PyObject* attribute(const Object& name) const;  // borrowed

  HostList& list_;
  Object attributes_;
  Object setting_names_;
  Object grad_descriptor_;
  TensorReader reader_;
  Object param_groups_name_, state_name_, params_name_, detach_name_;
  Object local_tensor_name_, spec_name_, placements_name_;

  Object seen_groups_, seen_state_;
  std::vector<GroupSnapshot> groups_;
  std::vector<StateSnapshot> states_;
  std::vector<Parameter> parameters_;
  std::vector<int64_t> layouts_;
  std::vector<FixedTensor> fixed_tensors_;
  std::vector<FixedTensor> setting_tensors_;
  Object written_;
  bool param_moved_ = false;           // in this refresh
  bool gradient_came_or_went_ = true;  // since `written_` was made
};

}  // namespace nexus
