// Notices, once a step, whatever a user changed since the pointers were read: a gradient that moved, appeared
// or went away, a parameter whose storage was swapped, a replaced moment, an added group, another
// hyperparameter.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../record.h"
#include "reader.h"
#include "state_watch.h"

namespace nexus {

namespace py = pybind11;

// Ordered: a higher value asks for more.
enum class Change { kNone = 0, kSettings = 1, kTensors = 2 };

// The records of an optimizer, kept up to date with what the user does. What the Python classes of every
// backend share.
class WatchedRecords {
 public:
  // `setting_names`: the keys of a group whose values are watched; the first is "lr". `last_write`: a list of
  // one object, which is another one after each write to a group. For `state_names` to `storage_users` see
  // StateWatch. `grad_descriptor`: torch's getter of Tensor.grad. For the rest see Reader.
  WatchedRecords(const py::tuple& setting_names, const py::list& last_write, const py::tuple& state_names,
                 int64_t storage_references, const py::object& count_users, int64_t storage_users,
                 const py::object& grad_descriptor, const py::object& exchange_api, const py::tuple& dtypes);

  // Forgets everything, and takes groups and state as they are now for what is expected from here on.
  // `attributes`: the optimizer's __dict__, which is not held: it owns these records.
  void begin(const py::dict& attributes);

  // Every group, once for each device, device by device. Takes the hyperparameters as they are now for what
  // is expected from here on.
  void fill_groups(const std::string& block);

  // Device by device. Where the gradients are, refresh() fills in.
  void fill_tensors(const std::string& block);

  // The next parameter, in the order of the groups, and one that has never had a gradient.
  void watch_parameter(const py::handle& param);

  // The next parameter, which has the TensorRecord `record`. `streams` is a tensor that is laid out as the
  // record's streams are: a gradient has to be as well, or is copied to `grad_buffer` by the caller.
  // `placements` are a DTensor's, whose part in this process is what is watched, and whose gradient has to
  // have them too, or is copied; None for any other tensor.
  void watch_entry(const py::handle& param, size_t record, const py::handle& streams, bool staged_param,
                   bool staged_grad, uintptr_t grad_buffer, const py::handle& placements);

  // A tensor whose memory must stay where it is.
  void watch_tensor(const py::handle& tensor);

  // The same, of a group's hyperparameters.
  // Where steps write to it, nobody else may: a kernel's writes do not count in the tensor's version, others
  // do.
  void watch_setting_tensor(const py::handle& tensor, bool written_by_steps);

  // Brings the records' pointers up to date and says what else there is to do, a Change. A float written to a
  // group's "lr" is taken over here; any other setting is the caller's.
  int refresh(const py::dict& attributes);

  // As refresh() has left them.
  const Records& records() const { return records_; }

  // Lets go of the state until the next refresh(), so that what is taken out of it is freed at once; in a
  // step, at its end.
  void release_state();

  // Ends the step that refresh() began: lets go of the gradients that it has found. They are held until then,
  // whatever another thread does to them meanwhile.
  void release_gradients();

  // The parameters that the next step writes to where they are: a tuple.
  py::object written() const { return py::reinterpret_borrow<py::object>(written_.get()); }

  // For the garbage collector: what is watched may refer to the optimizer, which owns these records.
  int traverse(visitproc visit, void* arg) const;
  void clear();

 protected:
  Records records_;

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
  };
  struct FixedTensor {
    Object tensor;
    void* data;
    Object version;  // a Python int; null where it may be any
  };

  void watch_settings();
  PyObject* last_write() const { return PyList_GET_ITEM(last_write_.get(), 0); }
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

  Object setting_names_;
  Object last_write_;
  Object grad_descriptor_;
  Object version_descriptor_;
  Reader reader_;
  Object param_groups_name_, grad_name_, params_name_, is_neg_name_;
  Object local_tensor_name_, spec_name_, placements_name_;

  uint64_t generation_ = 0;  // another after each begin()
  Object seen_groups_;
  std::vector<GroupSnapshot> groups_;
  Object seen_write_;  // when their settings were last compared
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
