#include "watch.h"

#include <stdexcept>
#include <utility>

#include "binding.h"

namespace nexus {

WatchedRecords::WatchedRecords(const py::tuple& setting_names, const py::list& last_write,
                               const py::tuple& state_names, int64_t storage_references,
                               const py::object& count_users, int64_t storage_users,
                               const py::object& grad_descriptor, const py::object& exchange_api,
                               const py::tuple& dtypes)
    : setting_names_(setting_names.ptr()),
      last_write_(last_write.ptr()),
      grad_descriptor_(grad_descriptor.ptr()),
      version_descriptor_(Object::own(PyObject_GetAttrString(
          reinterpret_cast<PyObject*>(PyDescr_TYPE(grad_descriptor.ptr())), "_version"))),
      reader_(exchange_api.ptr(), dtypes.ptr()),
      param_groups_name_(interned("param_groups")),
      grad_name_(interned("grad")),
      params_name_(interned("params")),
      is_neg_name_(interned("is_neg")),
      local_tensor_name_(interned("_local_tensor")),
      spec_name_(interned("_spec")),
      placements_name_(interned("placements")),
      state_(state_names.ptr(), storage_references, count_users.ptr(), storage_users, reader_) {}

void WatchedRecords::begin(const py::dict& attributes) {
  records_ = {};
  ++generation_;
  groups_.clear();
  parameters_.clear();
  layouts_.clear();
  fixed_tensors_.clear();
  gradient_came_or_went_ = true;
  PyObject* param_groups = item(attributes.ptr(), param_groups_name_.get());
  PyObject* state = PyDict_GetItemString(attributes.ptr(), "state");
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
    groups_.push_back({Object(group), Object(params), PyList_GET_SIZE(params), {}});
  }
  watch_settings();
  state_.reset(attributes.ptr());
}

void WatchedRecords::fill_groups(const std::string& block) {
  records_.groups = records_in<Group>(block);
  watch_settings();
}

void WatchedRecords::fill_tensors(const std::string& block) {
  records_.tensors = records_in<TensorRecord>(block);
}

void WatchedRecords::watch_settings() {
  setting_tensors_.clear();
  for (GroupSnapshot& seen : groups_) {
    seen.settings = settings_of(seen.group.get());
  }
  seen_write_ = Object(last_write());
}

std::vector<Object> WatchedRecords::settings_of(PyObject* group) const {
  std::vector<Object> settings;
  for (Py_ssize_t k = 0; k < PyTuple_GET_SIZE(setting_names_.get()); ++k) {
    settings.emplace_back(item(group, setting_name(static_cast<size_t>(k))));
  }
  return settings;
}

void WatchedRecords::watch_parameter(const py::handle& param) {
  parameters_.push_back({Object(param.ptr()),
                         has_own_gradient(param.ptr()),
                         -1,
                         false,
                         false,
                         {},
                         {},
                         0,
                         0,
                         0,
                         nullptr,
                         {},
                         {}});
}

void WatchedRecords::watch_entry(const py::handle& param, size_t record, const py::handle& streams,
                                 bool staged_param, bool staged_grad, uintptr_t grad_buffer,
                                 const py::handle& placements) {
  const TensorRecord& entry = records_.tensors.at(record);
  Description now;
  const bool spread = !placements.is_none();
  const Object local = spread ? local_part(param.ptr(), placements.ptr()) : Object(param.ptr());
  if (local.get() == nullptr || !reader_.describe(local.get(), now)) {
    PyErr_Clear();
    throw std::invalid_argument("a parameter could not be read");
  }
  parameters_.push_back({Object(param.ptr()),
                         has_own_gradient(param.ptr()),
                         static_cast<int64_t>(record),
                         staged_param,
                         staged_grad,
                         entry.param_dtype,
                         entry.grad_dtype,
                         now.device,
                         now.ndim,
                         layouts_.size(),
                         reinterpret_cast<void*>(grad_buffer),
                         spread ? Object(placements.ptr()) : Object(),
                         {}});
  layouts_.insert(layouts_.end(), now.shape, now.shape + now.ndim);
  layouts_.insert(layouts_.end(), now.strides, now.strides + now.ndim);
  if (!reader_.describe(streams.ptr(), now)) {
    throw std::invalid_argument("a parameter's streams could not be read");
  }
  layouts_.insert(layouts_.end(), now.strides, now.strides + now.ndim);
}

WatchedRecords::FixedTensor WatchedRecords::fixed(PyObject* tensor) {
  Description now;
  if (!reader_.describe(tensor, now)) {
    throw std::invalid_argument("a tensor of the optimizer could not be read");
  }
  return {Object(tensor), now.data, Object()};
}

void WatchedRecords::watch_tensor(const py::handle& tensor) { fixed_tensors_.push_back(fixed(tensor.ptr())); }

void WatchedRecords::watch_setting_tensor(const py::handle& tensor, bool written_by_steps) {
  setting_tensors_.push_back(fixed(tensor.ptr()));
  if (written_by_steps) {
    setting_tensors_.back().version = version(tensor.ptr());
  }
}

int WatchedRecords::traverse(visitproc visit, void* arg) const {
  Py_VISIT(seen_groups_.get());
  Py_VISIT(written_.get());
  for (const GroupSnapshot& group : groups_) {
    Py_VISIT(group.group.get());
    Py_VISIT(group.params.get());
    for (const Object& setting : group.settings) {
      Py_VISIT(setting.get());
    }
  }
  for (const Parameter& parameter : parameters_) {
    Py_VISIT(parameter.tensor.get());
  }
  for (const std::vector<FixedTensor>* tensors : {&fixed_tensors_, &setting_tensors_}) {
    for (const FixedTensor& tensor : *tensors) {
      Py_VISIT(tensor.tensor.get());
    }
  }
  return state_.traverse(visit, arg);
}

void WatchedRecords::clear() {
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

bool WatchedRecords::has_own_gradient(PyObject* param) const {
  const Object found =
      Object::own(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(param)), grad_name_.get()));
  PyErr_Clear();
  return found.get() != grad_descriptor_.get() || !Py_IS_TYPE(found.get(), &PyGetSetDescr_Type);
}

}  // namespace nexus
