#include "watch.h"

#include <cmath>
#include <stdexcept>
#include <utility>

#include "overlap.h"

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

Watch::Watch(Records& list, PyObject* setting_names, StateWatch state, PyObject* grad_descriptor,
             const Reader& reader)
    : records_(list),
      setting_names_(setting_names),
      grad_descriptor_(grad_descriptor),
      version_descriptor_(Object::own(
          PyObject_GetAttrString(reinterpret_cast<PyObject*>(PyDescr_TYPE(grad_descriptor)), "_version"))),
      reader_(reader),
      param_groups_name_(interned("param_groups")),
      grad_name_(interned("grad")),
      params_name_(interned("params")),
      is_neg_name_(interned("is_neg")),
      local_tensor_name_(interned("_local_tensor")),
      spec_name_(interned("_spec")),
      placements_name_(interned("placements")),
      state_(std::move(state)) {}

void Watch::reset(PyObject* attributes) {
  ++generation_;
  groups_.clear();
  parameters_.clear();
  layouts_.clear();
  fixed_tensors_.clear();
  gradient_came_or_went_ = true;
  PyObject* param_groups = item(attributes, param_groups_name_.get());
  PyObject* state = PyDict_GetItemString(attributes, "state");
  seen_groups_ = Object(param_groups);
  if (param_groups == nullptr || !PyList_Check(param_groups) || state == nullptr || !PyDict_Check(state)) {
    throw std::invalid_argument("the optimizer's param_groups must be a list and its state a dict");
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups); ++i) {
    PyObject* group = PyList_GET_ITEM(param_groups, i);
    PyObject* params = PyDict_Check(group) ? item(group, params_name_.get()) : nullptr;
    if (params == nullptr || !PyList_Check(params)) {
      throw std::invalid_argument("every parameter group must be a dict whose 'params' is a list");
    }
    groups_.push_back({Object(group), Object(params), PyList_GET_SIZE(params), {}, 0});
  }
  reset_settings();
  state_.reset(attributes);
}

void Watch::reset_settings() {
  setting_tensors_.clear();
  for (GroupSnapshot& seen : groups_) {
    seen.version = 0;
    seen.settings = settings_of(seen.group.get());
  }
}

std::vector<Object> Watch::settings_of(PyObject* group) const {
  std::vector<Object> settings;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(setting_names_.get()); ++k) {
    settings.emplace_back(item(group, setting_name(static_cast<size_t>(k))));
  }
  return settings;
}

void Watch::add_parameter(PyObject* param) {
  parameters_.push_back(
      {Object(param), has_own_gradient(param), -1, false, false, {}, {}, 0, 0, 0, nullptr, {}, {}});
}

void Watch::add_parameter(PyObject* param, int64_t record, PyObject* streams, bool staged_param,
                          bool staged_grad, void* grad_buffer, PyObject* placements) {
  const TensorRecord& entry = records_.tensors.at(static_cast<size_t>(record));
  Description now;
  const bool spread = placements != Py_None;
  const Object local = spread ? local_part(param, placements) : Object(param);
  if (local.get() == nullptr || !reader_.describe(local.get(), now)) {
    PyErr_Clear();
    throw std::invalid_argument("a parameter could not be read");
  }
  parameters_.push_back({Object(param),
                         has_own_gradient(param),
                         record,
                         staged_param,
                         staged_grad,
                         entry.param_dtype,
                         entry.grad_dtype,
                         now.device,
                         now.ndim,
                         layouts_.size(),
                         grad_buffer,
                         spread ? Object(placements) : Object(),
                         {}});
  layouts_.insert(layouts_.end(), now.shape, now.shape + now.ndim);
  layouts_.insert(layouts_.end(), now.strides, now.strides + now.ndim);
  if (!reader_.describe(streams, now)) {
    throw std::invalid_argument("a parameter's streams could not be read");
  }
  layouts_.insert(layouts_.end(), now.strides, now.strides + now.ndim);
}

Watch::FixedTensor Watch::fixed(PyObject* tensor) {
  Description now;
  if (!reader_.describe(tensor, now)) {
    throw std::invalid_argument("a tensor of the optimizer could not be read");
  }
  return {Object(tensor), now.data, Object()};
}

void Watch::add_tensor(PyObject* tensor) { fixed_tensors_.push_back(fixed(tensor)); }

void Watch::add_setting_tensor(PyObject* tensor, bool written_by_steps) {
  setting_tensors_.push_back(fixed(tensor));
  if (written_by_steps) {
    setting_tensors_.back().version = version(tensor);
  }
}

Object Watch::version(PyObject* tensor) const { return from_getter(version_descriptor_, tensor); }

int Watch::traverse(visitproc visit, void* arg) const {
  const auto each = [visit, arg](const Object& object) {
    return object.get() == nullptr ? 0 : visit(object.get(), arg);
  };
  int stop = each(seen_groups_);
  for (size_t i = 0; i < groups_.size() && stop == 0; ++i) {
    stop = each(groups_[i].group);
    stop = stop != 0 ? stop : each(groups_[i].params);
    for (size_t k = 0; k < groups_[i].settings.size() && stop == 0; ++k) {
      stop = each(groups_[i].settings[k]);
    }
  }
  stop = stop != 0 ? stop : state_.traverse(visit, arg);
  for (size_t i = 0; i < parameters_.size() && stop == 0; ++i) {
    stop = each(parameters_[i].tensor);
  }
  for (const std::vector<FixedTensor>* tensors : {&fixed_tensors_, &setting_tensors_}) {
    for (size_t i = 0; i < tensors->size() && stop == 0; ++i) {
      stop = each((*tensors)[i].tensor);
    }
  }
  return stop != 0 ? stop : each(written_);
}

void Watch::clear() {
  ++generation_;
  // Taken out first: what dies may call back. From here on, refresh() asks for a new plan.
  const Object seen_groups = std::exchange(seen_groups_, {});
  const auto groups = std::exchange(groups_, {});
  const auto parameters = std::exchange(parameters_, {});
  const auto fixed_tensors = std::exchange(fixed_tensors_, {});
  const auto setting_tensors = std::exchange(setting_tensors_, {});
  const Object written = std::exchange(written_, {});
  state_.clear();
}

bool Watch::same_groups(PyObject* attributes) const {
  PyObject* groups = item(attributes, param_groups_name_.get());
  if (groups != seen_groups_.get() || PyList_GET_SIZE(groups) != static_cast<Py_ssize_t>(groups_.size())) {
    return false;
  }
  size_t k = 0;
  for (size_t i = 0; i < groups_.size(); ++i) {
    const GroupSnapshot& seen = groups_[i];
    PyObject* group = seen.group.get();
    PyObject* params = seen.params.get();
    if (PyList_GET_ITEM(groups, static_cast<Py_ssize_t>(i)) != group ||
        PyList_GET_SIZE(params) != seen.count) {
      return false;
    }
    if (!unchanged(group, seen.version) && item(group, params_name_.get()) != params) {
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

Change Watch::same_settings() {
  Change change = in_place(setting_tensors_) ? Change::kNone : Change::kSettings;
  for (size_t i = 0; i < groups_.size(); ++i) {
    GroupSnapshot& seen = groups_[i];
    if (unchanged(seen.group.get(), seen.version)) {
      continue;
    }
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
    if (change == Change::kNone) {
      seen.version = dict_version(seen.group.get());
    }
  }
  return change;
}

bool Watch::in_place(const std::vector<FixedTensor>& tensors) const {
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

bool Watch::has_own_gradient(PyObject* param) const {
  const Object found =
      Object::own(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(param)), grad_name_.get()));
  PyErr_Clear();
  return found.get() != grad_descriptor_.get() || !Py_IS_TYPE(found.get(), &PyGetSetDescr_Type);
}

Object Watch::gradient(const Parameter& parameter) const {
  PyObject* param = parameter.tensor.get();
  if (parameter.own_gradient) {
    return Object::own(PyObject_GetAttr(param, grad_name_.get()));
  }
  return from_getter(grad_descriptor_, param);
}

// The part of a DTensor that is in this process; null where it is spread over the processes otherwise.
Object Watch::local_part(PyObject* tensor, PyObject* placements) const {
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
bool Watch::same_layout(const Parameter& parameter, const Description& now, const int64_t* strides) const {
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
bool Watch::is_negated(PyObject* tensor) const {
  const Object answer = Object::own(PyObject_CallMethodNoArgs(tensor, is_neg_name_.get()));
  PyErr_Clear();
  return answer.get() == Py_True;
}

bool Watch::refresh_parameter(Parameter& parameter) {
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

void Watch::release_state() {
  if (in_step_) {
    release_state_later_ = true;
  } else {
    state_.release();
  }
}

void Watch::release_gradients() {
  in_step_ = false;
  if (std::exchange(release_state_later_, false)) {
    state_.release();
  }
  for (Parameter& parameter : parameters_) {
    parameter.grad = Object();
  }
}

void Watch::find_written() {
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

Change Watch::refresh(PyObject* attributes) {
  if (seen_groups_.get() == nullptr || !same_groups(attributes) || !state_.same(attributes) ||
      !in_place(fixed_tensors_)) {
    return Change::kTensors;
  }
  param_moved_ = false;
  for (Parameter& parameter : parameters_) {
    if (!refresh_parameter(parameter)) {
      return Change::kTensors;
    }
  }
  if (param_moved_ || gradient_came_or_went_) {
    if (overlap(records_.tensors).first >= 0) {
      return Change::kTensors;
    }
    find_written();
  }
  in_step_ = true;
  return same_settings();
}

}  // namespace nexus
