#include "optim/operator.h"

#include <cmath>
#include <cstring>

namespace ds {
namespace {

// Write-only streams of fewer bytes than this stay in the caches until they are read.
constexpr int64_t kAroundCacheBytes = 4 << 20;

}  // namespace

StepTensors::StepTensors(const char* op, const Tensor& param, bool written)
    : op_(op), param_(param), numel_(param.numel()) {
  check_float(op, "param", param);
  check_plain(op, "param", param);
  all_.push_back({"param", param, written});
  // Only what says that it writes makes a lazy copy (torch's copy-on-write) a copy of its own.
  streams_.param = written ? param.mutable_data_ptr() : const_cast<void*>(param.const_data_ptr());
  streams_.param_type = float_type(param);
  streams_.grad_scale = 1.0f;
}

void StepTensors::shaped(const char* argument, const Tensor& t) {
  check_plain(op_, argument, t);
  bool same = t.dim() == param_.dim();
  for (int64_t dim = 0; same && dim < t.dim(); ++dim) same = t.size(dim) == param_.size(dim);
  STD_TORCH_CHECK(same, op_, ": ", argument, ": got shape ", shape_text(t), ", expected ",
                  shape_text(param_));
}

void StepTensors::grad(const char* argument, const Tensor& t) {
  check_float(op_, argument, t);
  shaped(argument, t);
  all_.push_back({argument, t, false});
  streams_.grad = t.const_data_ptr();
  streams_.grad_type = float_type(t);
}

void StepTensors::state(const char* argument, Tensor& t) {
  const ScalarType dtype = t.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op_, ": ", argument,
                  ": got ", dtype_name(dtype), ", expected torch.float32 or torch.bfloat16");
  if (!states_.empty()) check_dtype(op_, argument, t, states_[0].scalar_type());
  shaped(argument, t);
  all_.push_back({argument, t, true});
  streams_.states[states_.size()] = t.mutable_data_ptr();
  streams_.state_type = float_type(t);
  states_.push_back(t);
}

void StepTensors::copy(const char* argument, std::optional<Tensor>& t) {
  if (!t) return;
  check_float(op_, argument, *t);
  shaped(argument, *t);
  all_.push_back({argument, *t, true});
  streams_.copy = t->mutable_data_ptr();
  streams_.copy_type = float_type(*t);
}

void StepTensors::undo(std::optional<Tensor>& t) {
  if (!t) return;
  check_dtype(op_, "undo", *t, ScalarType::Byte);
  check_plain(op_, "undo", *t);
  const int64_t of_param = numel_ * size_of(streams_.param_type);
  const int64_t of_state = states_.empty() ? 0 : numel_ * size_of(streams_.state_type);
  const int64_t bytes = of_param + static_cast<int64_t>(states_.size()) * of_state;
  STD_TORCH_CHECK(t->dim() == 1 && t->numel() == bytes, op_, ": undo: got shape ", shape_text(*t),
                  ", expected [", bytes, "], the bytes of param and of each state");
  all_.push_back({"undo", *t, true});
  char* at = static_cast<char*>(t->mutable_data_ptr());
  streams_.undo[0] = at;
  for (size_t k = 0; k < states_.size(); ++k) streams_.undo[k + 1] = at + of_param + k * of_state;
}

void StepTensors::grad_scale(const std::optional<Tensor>& t, bool maximize) {
  const float scale = t ? scalar("grad_scale", *t) : 1.0f;
  streams_.grad_scale = maximize ? -scale : scale;
}

void StepTensors::found_inf(const std::optional<Tensor>& t) {
  skips_ = t && scalar("found_inf", *t) != 0.0f;
}

float StepTensors::scalar(const char* argument, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 0 && t.scalar_type() == ScalarType::Float, op_, ": ", argument,
                  ": got ", dtype_name(t.scalar_type()), " of shape ", shape_text(t),
                  ", expected a 0-dim torch.float32");
  check_plain(op_, argument, t);
  all_.push_back({argument, t, false});
  return *static_cast<const float*>(t.const_data_ptr());
}

void StepTensors::keep_for_undo() const {
  if (!streams_.undo[0] || numel_ == 0) return;
  std::memcpy(streams_.undo[0], streams_.param, numel_ * size_of(streams_.param_type));
  for (size_t k = 0; k < states_.size(); ++k)
    std::memcpy(streams_.undo[k + 1], streams_.states[k], numel_ * size_of(streams_.state_type));
}

void StepTensors::seed(std::optional<int64_t> seed) {
  streams_.stochastic = seed.has_value();
  streams_.seed = static_cast<uint64_t>(seed.value_or(0));
}

void StepTensors::other(const char* argument, const Tensor& t, bool written) {
  all_.push_back({argument, t, written});
}

const StepStreams& StepTensors::checked() {
  for (size_t i = 0; i < all_.size(); ++i) {
    for (size_t j = i + 1; j < all_.size(); ++j) {
      if (!all_[i].written && !all_[j].written) continue;
      check_apart(op_, all_[i].argument, all_[i].tensor, all_[j].argument, all_[j].tensor);
    }
  }
  streams_.around_cache = numel_ * 2 >= kAroundCacheBytes;
  return streams_;
}

void check_rate(const char* op, const char* argument, double value) {
  STD_TORCH_CHECK(value >= 0, op, ": ", argument, ": got ", value, ", expected 0 or more");
}

void check_beta(const char* op, const char* argument, double value) {
  STD_TORCH_CHECK(value >= 0 && value < 1, op, ": ", argument, ": got ", value,
                  ", expected at least 0 and below 1");
}

void check_step(const char* op, int64_t step) {
  STD_TORCH_CHECK(step >= 1, op, ": step: got ", step, ", expected 1 or more, counting this step");
}

AdamStep adam_step(const char* op, double lr, double beta1, double beta2, double eps,
                   double weight_decay, int64_t step, bool decoupled, bool bias_correction) {
  check_rate(op, "lr", lr);
  check_beta(op, "beta1", beta1);
  check_beta(op, "beta2", beta2);
  check_rate(op, "eps", eps);
  check_rate(op, "weight_decay", weight_decay);
  check_step(op, step);
  const double t = static_cast<double>(step);
  const double unbias1 = bias_correction ? 1 - std::pow(beta1, t) : 1;
  const double unbias2 = bias_correction ? 1 - std::pow(beta2, t) : 1;
  AdamStep found{};
  found.beta2 = static_cast<float>(beta2);
  found.eps = static_cast<float>(eps);
  found.one_minus_beta1 = static_cast<float>(1 - beta1);
  found.one_minus_beta2 = static_cast<float>(1 - beta2);
  found.step_size = static_cast<float>(lr / unbias1);
  found.root_scale = static_cast<float>(1 / std::sqrt(unbias2));
  found.decay = decoupled ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  found.l2 = decoupled ? 0.0f : static_cast<float>(weight_decay);
  return found;
}

}  // namespace ds
