// Notices, once a step, whatever a user changed since the pointers were read: a gradient that moved, appeared
// or went away, a parameter whose storage was swapped, a replaced moment, an added group, another
// hyperparameter.
#pragma once

#include <Python.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../record.h"
#include "reader.h"
#include "state_watch.h"

namespace nexus {

// Ordered: a higher value asks for more.
enum class Change { kNone = 0, kSettings = 1, kTensors = 2 };

class Watch {
 public:
  // `setting_names`: the keys of a group whose values are watched; the first is "lr". `grad_descriptor`:
  // torch's getter of Tensor.grad.
  Watch(Records& list, PyObject* setting_names, StateWatch state, PyObject* grad_descriptor,
        const Reader& reader);

  // Forgets everything, and takes groups and state as they are now for what is expected from here on.
  // `attributes`: the optimizer's __dict__, which is not held: it owns this watch.
  void reset(PyObject* attributes);

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
  // Where steps write to it, nobody else may: a kernel's writes do not count in the tensor's version, others
  // do.
  void add_setting_tensor(PyObject* tensor, bool written_by_steps);

  // Brings the list's pointers up to date and says what else there is to do. A float written to a group's
  // "lr" is taken over here; any other setting is the caller's.
  Change refresh(PyObject* attributes);

  // Lets go of the state until the next refresh(), so that what is taken out of it is freed at once; in a
  // step, at its end.
  void release_state();

  // Ends the step that refresh() began: lets go of the gradients that it has found. They are held until then,
  // whatever another thread does to them meanwhile.
  void release_gradients();

  // The parameters that the next step writes to where they are: a tuple; borrowed.
  PyObject* written() const { return written_.get(); }

  // For the garbage collector: what is watched may refer to the optimizer, which owns this watch.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 private:
  friend class Glance;

  struct Parameter {
    Object tensor;
    bool own_gradient;  // whether its class has a `grad` of its own
    int64_t record;     // -1: none
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
  struct FixedTensor {
    Object tensor;
    void* data;
    Object version;  // a Python int; null where it may be any
  };

  bool same_groups(PyObject* attributes) const;
  Change same_settings();
  bool in_place(const std::vector<FixedTensor>& tensors) const;
  std::vector<Object> settings_of(PyObject* group) const;
  PyObject* setting_name(size_t index) const {
    return PyTuple_GET_ITEM(setting_names_.get(), static_cast<Py_ssize_t>(index));
  }
  bool refresh_parameter(Parameter& parameter);
  bool same_layout(const Parameter& parameter, const Description& now, const int64_t* strides) const;
  bool is_negated(PyObject* tensor) const;
  Object version(PyObject* tensor) const;
  bool has_own_gradient(PyObject* param) const;
  void find_written();
  FixedTensor fixed(PyObject* tensor);
  Object gradient(const Parameter& parameter) const;
  Object local_part(PyObject* tensor, PyObject* placements) const;

  Records& records_;
  Object setting_names_;
  Object grad_descriptor_;
  Object version_descriptor_;
  Reader reader_;
  Object param_groups_name_, grad_name_, params_name_, is_neg_name_;
  Object local_tensor_name_, spec_name_, placements_name_;

  uint64_t generation_ = 0;  // another after each reset()
  Object seen_groups_;
  std::vector<GroupSnapshot> groups_;
  StateWatch state_;
  std::vector<Parameter> parameters_;
  std::vector<int64_t> layouts_;
  std::vector<FixedTensor> fixed_tensors_;
  std::vector<FixedTensor> setting_tensors_;
  Object written_;
  bool in_step_ = false;  // from refresh() to release_gradients()
  bool release_state_later_ = false;
  bool param_moved_ = false;           // in this refresh
  bool gradient_came_or_went_ = true;  // since `written_` was made
};

}  // namespace nexus
