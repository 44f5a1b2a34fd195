// What has changed since the records were last brought up to date.
#include <cmath>
#include <utility>

#include "overlap.h"
#include "watch.h"

namespace nexus {
namespace {

// What a getter of the tensor class returns, asked without a look-up by name: that would add a quarter to the
// cost of a step over small tensors.
Object from_getter(const Object& descriptor, PyObject* tensor) {
  const PyGetSetDef* getset = reinterpret_cast<PyGetSetDescrObject*>(descriptor.get())->d_getset;
  return Object::own(getset->get(tensor, getset->closure));
}

// Stands for the gradient of a parameter without elements: null would say that it has none.
const char kEmptyGradient = 0;

}  // namespace

Object WatchedRecords::version(PyObject* tensor) const { return from_getter(version_descriptor_, tensor); }

bool WatchedRecords::same_groups(PyObject* attributes) const {
  PyObject* groups = item(attributes, param_groups_name_.get());
  if (groups != seen_groups_.get() || PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) {
    return false;
  }
  const bool written = last_write() != seen_write_.get();
  size_t k = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const GroupSnapshot& seen = groups_[i];
    PyObject* group = seen.group.get();
    PyObject* params = seen.params.get();
    if (PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i)) != group ||
        PyList_GET_SIZE(params) != seen.count) {
      return false;
    }
    if (written && item(group, params_name_.get()) != params) {
      return false;
    }
    for (Py_ssize_t j = 0; j < seen.count; ++j, ++k) {
      if (PyList_GET_ITEM(params, j) != parameters_[k].tensor.get()) {
        return false;
      }
    }
  }
  return true;
}

Change WatchedRecords::same_settings() {
  Change change = in_place(setting_tensors_) ? Change::kNone : Change::kSettings;
  if (last_write() == seen_write_.get()) {
    return change;
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    GroupSnapshot& seen = groups_[i];
    for (size_t k = 0; k < seen.settings.size(); ++k) {
      PyObject* value = item(seen.group.get(), setting_name(k));
      if (value == seen.settings[k].get()) {
        continue;
      }
      const Rate& lr = records_.groups[i].lr;
      const bool plain = k == 0 && value != nullptr && lr.table == nullptr && lr.tensor == nullptr;
      if (plain && PyFloat_Check(value)) {  // what torch's schedulers write at every step; NumPy's, too
        const double number = PyFloat_AS_DOUBLE(value);
        if (std::isfinite(number) && number >= 0.0) {
          for (size_t j = i; j < records_.groups.size(); j += groups_.size()) {  // on every device
            records_.groups[j].lr.value = number;
          }
          seen.settings[k] = Object(value);
          continue;
        }
      }
      change = Change::kSettings;
    }
  }
  if (change == Change::kNone) {
    seen_write_ = Object(last_write());
  }
  return change;
}

bool WatchedRecords::in_place(const std::vector<FixedTensor>& tensors) const {
  Description now;
  for (const FixedTensor& tensor : tensors) {
    if (!reader_.describe(tensor.tensor.get(), now) || now.data != tensor.data) {
      return false;
    }
    if (tensor.version.get() != nullptr &&
        PyObject_RichCompareBool(version(tensor.tensor.get()).get(), tensor.version.get(), Py_EQ) != 1) {
      PyErr_Clear();
      return false;
    }
  }
  return true;
}

Object WatchedRecords::gradient(const Parameter& parameter) const {
  PyObject* param = parameter.tensor.get();
  if (parameter.own_gradient) {
    return Object::own(PyObject_GetAttr(param, grad_name_.get()));
  }
  return from_getter(grad_descriptor_, param);
}

// The part of a DTensor that is in this process; null where it is spread over the processes otherwise.
Object WatchedRecords::local_part(PyObject* tensor, PyObject* placements) const {
  const Object spec = Object::own(PyObject_GetAttr(tensor, spec_name_.get()));
  const Object now =
      spec.get() == nullptr ? Object() : Object::own(PyObject_GetAttr(spec.get(), placements_name_.get()));
  if (now.get() == nullptr || PyObject_RichCompareBool(now.get(), placements, Py_EQ) != 1) {
    PyErr_Clear();
    return Object();
  }
  Object local = Object::own(PyObject_GetAttr(tensor, local_tensor_name_.get()));
  if (local.get() == nullptr) {
    PyErr_Clear();
  }
  return local;
}

// `strides`: the expected ones; null where any will do.
bool WatchedRecords::same_layout(const Parameter& parameter, const Description& now,
                                 const int64_t* strides) const {
  if (now.device != parameter.device || now.ndim != parameter.ndim) {
    return false;
  }
  const int64_t* shape = layouts_.data() + parameter.layout;
  int64_t numel = 1;
  for (int d = 0; d < now.ndim; ++d) {
    if (now.shape[d] != shape[d] || (strides != nullptr && shape[d] > 1 && now.strides[d] != strides[d])) {
      return false;
    }
    numel *= shape[d];
  }
  // Null: its storage was freed. What is copied may have none, as the zeros that autograd makes of nothing.
  return now.data != nullptr || numel == 0 || strides == nullptr;
}

// DLPack does not tell a negated view, whose memory has the other sign.
bool WatchedRecords::is_negated(PyObject* tensor) const {
  const Object answer = Object::own(PyObject_CallMethodNoArgs(tensor, is_neg_name_.get()));
  PyErr_Clear();
  return answer.get() == Py_True;
}

bool WatchedRecords::refresh_parameter(Parameter& parameter) {
  PyObject* param = parameter.tensor.get();
  Object grad = gradient(parameter);
  if (grad.get() == nullptr) {
    PyErr_Clear();
    return false;
  }
  const bool missing = grad.get() == Py_None;
  if (parameter.record < 0) {
    return missing;
  }
  TensorRecord& record = records_.tensors[static_cast<size_t>(parameter.record)];
  if (missing != (record.grad == nullptr)) {
    gradient_came_or_went_ = true;
  }
  const int64_t* strides = layouts_.data() + parameter.layout + parameter.ndim;
  const bool spread = parameter.placements.get() != nullptr;
  const Object local = spread ? local_part(param, parameter.placements.get()) : Object(param);
  Description now;
  const bool readable = local.get() != nullptr && reader_.describe(local.get(), now);
  if (missing) {  // so that it may be anything; where it is, who replays a graph wants to know
    record.grad = nullptr;
    record.param = readable && !parameter.staged_param ? now.data : record.param;
    return true;
  }
  if (!readable || now.dtype != parameter.dtype || !same_layout(parameter, now, strides)) {
    return false;
  }
  if (!parameter.staged_param && record.param != now.data) {
    record.param = now.data;
    param_moved_ = true;
  }
  if (spread && !parameter.staged_grad) {
    grad = local_part(grad.get(), parameter.placements.get());
  }
  if (parameter.staged_grad) {  // a DTensor's part may be of any shape here, and a wrapper may have no memory
    const bool plain = !spread && reader_.describe(grad.get(), now);
    if (reader_.dtype(grad.get()) != parameter.grad_dtype ||
        (plain && !same_layout(parameter, now, nullptr))) {
      return false;
    }
  } else if (grad.get() == nullptr || !reader_.describe(grad.get(), now) ||
             now.dtype != parameter.grad_dtype || !same_layout(parameter, now, strides + parameter.ndim)) {
    return false;
  } else if (record.numel == 1 && is_negated(grad.get())) {
    return false;  // of more elements, such a view (the imaginary part of a conjugate) has another layout
  }
  const void* data = parameter.staged_grad ? parameter.grad_buffer : now.data;
  record.grad = data != nullptr ? data : &kEmptyGradient;
  parameter.grad = std::move(grad);
  return true;
}

void WatchedRecords::release_state() {
  if (in_step_) {
    release_state_later_ = true;
  } else {
    state_.release();
  }
}

void WatchedRecords::release_gradients() {
  in_step_ = false;
  if (std::exchange(release_state_later_, false)) {
    state_.release();
  }
  for (Parameter& parameter : parameters_) {
    parameter.grad = Object();
  }
}

void WatchedRecords::find_written() {
  std::vector<PyObject*> params;
  for (const Parameter& parameter : parameters_) {
    if (parameter.record >= 0 && !parameter.staged_param &&
        records_.tensors[static_cast<size_t>(parameter.record)].grad != nullptr) {
      params.push_back(parameter.tensor.get());
    }
  }
  written_ = Object::own(PyTuple_New(static_cast<Py_ssize_t>(params.size())));
  for (size_t i = 0; i < params.size(); ++i) {
    Py_INCREF(params[i]);
    PyTuple_SET_ITEM(written_.get(), static_cast<Py_ssize_t>(i), params[i]);
  }
  gradient_came_or_went_ = false;
}

int WatchedRecords::refresh(const py::dict& attributes) {
  constexpr int kTensors = static_cast<int>(Change::kTensors);
  if (seen_groups_.get() == nullptr || !same_groups(attributes.ptr()) || !state_.same(attributes.ptr()) ||
      !in_place(fixed_tensors_)) {
    return kTensors;
  }
  param_moved_ = false;
  for (Parameter& parameter : parameters_) {
    if (!refresh_parameter(parameter)) {
      return kTensors;
    }
  }
  if (param_moved_ || gradient_came_or_went_) {
    if (overlap(records_.tensors).first >= 0) {
      return kTensors;
    }
    find_written();
  }
  in_step_ = true;
  return static_cast<int>(same_settings());
}

}  // namespace nexus
