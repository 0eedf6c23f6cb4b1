#include "optim/step.h"

#include <vector>

#include "optim/operator.h"

namespace ds {
namespace {

using Maybe = std::optional<Tensor>;
using Seed = std::optional<int64_t>;

// Runs a kernel over all elements of `tensors`, which are checked here.
template <typename Kernel, typename Step>
void run(StepTensors& tensors, Kernel kernel, const Step& step) {
  const StepStreams& streams = tensors.checked();
  if (tensors.skips()) return tensors.keep_for_undo();
  parallel(
      tensors.numel(), kStepGrain,
      [&](int64_t begin, int64_t end) { kernel(streams, step, begin, end); }, kStepAlign);
}

void adam_step_(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Maybe copy,
                Maybe undo, Maybe grad_scale, double lr, double beta1, double beta2, double eps,
                double weight_decay, int64_t step, bool decoupled, bool bias_correction,
                bool maximize, Seed seed, Maybe found_inf) {
  constexpr const char* kOp = "adam_step_";
  StepTensors tensors(kOp, param);
  tensors.grad("grad", grad);
  tensors.state("exp_avg", exp_avg);
  tensors.state("exp_avg_sq", exp_avg_sq);
  tensors.copy("copy", copy);
  tensors.undo(undo);
  tensors.grad_scale(grad_scale, maximize);
  tensors.found_inf(found_inf);
  tensors.seed(seed);
  const AdamStep call = adam_step(kOp, lr, beta1, beta2, eps, weight_decay, step, decoupled,
                                  bias_correction);
  run(tensors, DS_BEST(adam_elements), call);
}

void lion_step_(Tensor param, Tensor grad, Tensor exp_avg, Maybe copy, Maybe undo,
                Maybe grad_scale, double lr, double beta1, double beta2, double weight_decay,
                bool maximize, Seed seed, Maybe found_inf) {
  constexpr const char* kOp = "lion_step_";
  check_rate(kOp, "lr", lr);
  check_beta(kOp, "beta1", beta1);
  check_beta(kOp, "beta2", beta2);
  check_rate(kOp, "weight_decay", weight_decay);
  StepTensors tensors(kOp, param);
  tensors.grad("grad", grad);
  tensors.state("exp_avg", exp_avg);
  tensors.copy("copy", copy);
  tensors.undo(undo);
  tensors.grad_scale(grad_scale, maximize);
  tensors.found_inf(found_inf);
  tensors.seed(seed);
  const LionStep call{static_cast<float>(beta1),     static_cast<float>(beta2),
                      static_cast<float>(1 - beta1), static_cast<float>(1 - beta2),
                      static_cast<float>(lr),        static_cast<float>(1 - lr * weight_decay)};
  run(tensors, DS_BEST(lion_elements), call);
}

void adagrad_step_(Tensor param, Tensor grad, Tensor sum, Maybe copy, Maybe undo,
                   Maybe grad_scale, double lr, double lr_decay, double eps, double weight_decay,
                   int64_t step, bool maximize, Seed seed, Maybe found_inf) {
  constexpr const char* kOp = "adagrad_step_";
  check_rate(kOp, "lr", lr);
  check_rate(kOp, "lr_decay", lr_decay);
  check_rate(kOp, "eps", eps);
  check_rate(kOp, "weight_decay", weight_decay);
  check_step(kOp, step);
  StepTensors tensors(kOp, param);
  tensors.grad("grad", grad);
  tensors.state("sum", sum);
  tensors.copy("copy", copy);
  tensors.undo(undo);
  tensors.grad_scale(grad_scale, maximize);
  tensors.found_inf(found_inf);
  tensors.seed(seed);
  const double decayed = lr / (1 + static_cast<double>(step - 1) * lr_decay);
  const AdagradStep call{static_cast<float>(decayed), static_cast<float>(eps),
                         static_cast<float>(weight_decay)};
  run(tensors, DS_BEST(adagrad_elements), call);
}

void sgd_step_(Tensor param, Tensor grad, Maybe momentum_buffer, Maybe copy, Maybe undo,
               Maybe grad_scale, double lr, double momentum, double dampening,
               double weight_decay, bool nesterov, bool maximize, bool first_step, Seed seed,
               Maybe found_inf) {
  constexpr const char* kOp = "sgd_step_";
  check_rate(kOp, "lr", lr);
  check_rate(kOp, "momentum", momentum);
  check_rate(kOp, "weight_decay", weight_decay);
  STD_TORCH_CHECK(momentum_buffer.has_value() == (momentum != 0), kOp, ": momentum_buffer: got ",
                  momentum_buffer ? "a tensor" : "None", ", expected ",
                  momentum_buffer ? "None for momentum 0" : "a tensor for momentum ",
                  momentum_buffer ? "" : std::to_string(momentum));
  STD_TORCH_CHECK(!nesterov || (momentum > 0 && dampening == 0), kOp,
                  ": nesterov: got True, expected False without momentum or with dampening");
  StepTensors tensors(kOp, param);
  tensors.grad("grad", grad);
  if (momentum_buffer) tensors.state("momentum_buffer", *momentum_buffer);
  tensors.copy("copy", copy);
  tensors.undo(undo);
  tensors.grad_scale(grad_scale, maximize);
  tensors.found_inf(found_inf);
  tensors.seed(seed);
  const SgdStep call{static_cast<float>(lr),
                     static_cast<float>(weight_decay),
                     static_cast<float>(momentum),
                     static_cast<float>(1 - dampening),
                     nesterov,
                     first_step};
  run(tensors, DS_BEST(sgd_elements), call);
}

// --- LAMB ----------------------------------------------------------------------------------------

Tensor lamb_update_(Tensor param, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, Tensor update,
                    Maybe grad_scale, double beta1, double beta2, double eps,
                    double weight_decay, int64_t step, bool bias_correction, Maybe found_inf) {
  constexpr const char* kOp = "lamb_update_";
  StepTensors tensors(kOp, param, /*written=*/false);
  tensors.grad("grad", grad);
  tensors.state("exp_avg", exp_avg);
  tensors.state("exp_avg_sq", exp_avg_sq);
  check_dtype(kOp, "update", update, ScalarType::Float);
  Maybe target = update;
  tensors.copy("update", target);
  tensors.grad_scale(grad_scale);
  tensors.found_inf(found_inf);
  const AdamStep call = adam_step(kOp, /*lr=*/1, beta1, beta2, eps, weight_decay, step,
                                  /*decoupled=*/false, bias_correction);
  const StepStreams& streams = tensors.checked();
  Tensor squares = torch::stable::new_empty(param, {2}, ScalarType::Float);
  float* total = static_cast<float*>(squares.mutable_data_ptr());
  total[0] = total[1] = 0.0f;
  if (tensors.skips()) return squares;
  // Fixed parts, whose sums are added in order: the same norms with any number of threads.
  const int64_t parts = (tensors.numel() + kStepGrain - 1) / kStepGrain;
  std::vector<double> sums(static_cast<size_t>(parts) * 2);
  const auto kernel = DS_BEST(lamb_update_elements);
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t stop = (part + 1) * kStepGrain;
      kernel(streams, call, sums.data() + 2 * part, part * kStepGrain,
             stop < tensors.numel() ? stop : tensors.numel());
    }
  });
  for (int which = 0; which < 2; ++which) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sums[2 * part + which];
    total[which] = static_cast<float>(sum);
  }
  return squares;
}

void lamb_apply_(Tensor param, Tensor update, Maybe copy, double step_size, Maybe ratio,
                 Maybe found_inf) {
  constexpr const char* kOp = "lamb_apply_";
  StepTensors tensors(kOp, param);
  check_dtype(kOp, "update", update, ScalarType::Float);
  tensors.grad("update", update);
  tensors.copy("copy", copy);
  tensors.found_inf(found_inf);
  const float factor = ratio ? tensors.scalar("ratio", *ratio) : 1.0f;
  run(tensors, DS_BEST(lamb_apply_elements), static_cast<float>(step_size) * factor);
}

// --- Undo ----------------------------------------------------------------------------------------

// Puts back the parameter and the states that a step kept in `undo`, bit for bit.
void step_undo_(Tensor param, std::vector<Tensor> states, Maybe copy, Tensor undo) {
  constexpr const char* kOp = "step_undo_";
  STD_TORCH_CHECK(states.size() <= 2, kOp, ": states: got ", states.size(), ", expected 0 to 2");
  StepTensors tensors(kOp, param);
  for (Tensor& state : states) tensors.state("states", state);
  tensors.copy("copy", copy);
  Maybe kept = undo;
  tensors.undo(kept);
  run(tensors, DS_BEST(undo_elements), static_cast<int>(states.size()));
}

DS_OP(adam_step_, adam_step_);
DS_OP(lion_step_, lion_step_);
DS_OP(adagrad_step_, adagrad_step_);
DS_OP(sgd_step_, sgd_step_);
DS_OP(lamb_update_, lamb_update_);
DS_OP(lamb_apply_, lamb_apply_);
DS_OP(step_undo_, step_undo_);

}  // namespace
}  // namespace ds
