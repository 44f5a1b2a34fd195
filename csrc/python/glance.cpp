#include "glance.h"

#include <utility>

namespace nexus {

bool Glance::look(const WatchedRecords::Parameter& parameter, void*& data, Object& grad) const {
  PyObject* param = parameter.tensor.get();
  const bool spread = parameter.placements.get() != nullptr;
  const Object local = spread ? watch_.local_part(param, parameter.placements.get()) : Object(param);
  grad = watch_.gradient(parameter);
  Description now;
  if (local.get() == nullptr || grad.get() == nullptr || !watch_.reader_.describe(local.get(), now)) {
    PyErr_Clear();
    return false;
  }
  data = now.data;
  return true;
}

void Glance::remember(const py::dict& attributes) {
  const auto last = std::exchange(parameters_, {});  // until the end: what dies may call back
  const auto last_settings = std::exchange(settings_, {});
  generation_ = watch_.generation_;
  is_remembered_ = watch_.same_groups(attributes.ptr()) && watch_.in_place(watch_.setting_tensors_);
  for (const WatchedRecords::Parameter& parameter : watch_.parameters_) {
    Seen seen = {nullptr, {}};
    is_remembered_ = is_remembered_ && look(parameter, seen.data, seen.grad);
    parameters_.push_back(std::move(seen));
  }
  for (const WatchedRecords::GroupSnapshot& group : watch_.groups_) {
    settings_.push_back(watch_.settings_of(group.group.get()));
  }
  seen_write_ = Object(watch_.last_write());
}

bool Glance::same(const py::dict& attributes) const {
  if (!is_remembered_ || generation_ != watch_.generation_ || !watch_.same_groups(attributes.ptr()) ||
      !watch_.in_place(watch_.setting_tensors_)) {
    return false;
  }
  for (size_t i = 0; i < settings_.size() && watch_.last_write() != seen_write_.get(); ++i) {
    for (size_t k = 0; k < settings_[i].size(); ++k) {
      if (item(watch_.groups_[i].group.get(), watch_.setting_name(k)) != settings_[i][k].get()) {
        return false;
      }
    }
  }
  void* data = nullptr;
  Object grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    const Seen& seen = parameters_[i];
    if (!look(watch_.parameters_[i], data, grad) || data != seen.data || grad.get() != seen.grad.get()) {
      return false;
    }
  }
  return true;
}

}  // namespace nexus
