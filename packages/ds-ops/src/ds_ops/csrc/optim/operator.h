// What the operators of optimizers share: checks of their tensors, which become `StepStreams`.
#pragma once

#include <string>
#include <vector>

#include "common/op.h"
#include "optim/step.h"

namespace ds {

// Parts of fewer elements than this cost more to hand to a thread than to compute.
constexpr int64_t kStepGrain = 16384;
// Parts begin at multiples of this, so that a stream which is aligned at its begin is so in all.
constexpr int64_t kStepAlign = 256;

// The tensors of one call, checked one after the other, and at the end against each other: whatever
// was passed, a kernel that runs on them stays inside of them.
class StepTensors {
 public:
  // `param` gives device and shape to all others.
  StepTensors(const char* op, const Tensor& param, bool written = true);

  void grad(const char* argument, const Tensor& t);
  void state(const char* argument, Tensor& t);
  void copy(const char* argument, std::optional<Tensor>& t);
  // Exactly as many bytes as `param` and the states have; call it after them.
  void undo(std::optional<Tensor>& t);
  void grad_scale(const std::optional<Tensor>& t, bool maximize = false);
  // The number in a 0-dim fp32 tensor.
  float scalar(const char* argument, const Tensor& t);
  // Not 0: the call changes nothing.
  void found_inf(const std::optional<Tensor>& t);
  // bf16 is rounded by it.
  void seed(std::optional<int64_t> seed);
  // Also to be apart from all others; for tensors that are no streams.
  void other(const char* argument, const Tensor& t, bool written);
  // Contiguous and of the shape of `param`, or an error.
  void shaped(const char* argument, const Tensor& t);

  // Refuses tensors that overlap, and returns what the kernels take.
  const StepStreams& checked();
  int64_t numel() const { return numel_; }
  // Whether nothing is to be changed.
  bool skips() const { return skips_; }
  // What a step that changes nothing does: the old bytes go to `undo`, if there is one.
  void keep_for_undo() const;

 private:
  struct Named {
    const char* argument;
    Tensor tensor;
    bool written;
  };

  const char* op_;
  Tensor param_;
  std::vector<Named> all_;
  std::vector<Tensor> states_;
  int64_t numel_;
  bool skips_ = false;
  StepStreams streams_{};
};

// A number that must not be negative; a beta, in [0, 1); the number of a step, from 1.
void check_rate(const char* op, const char* argument, double value);
void check_beta(const char* op, const char* argument, double value);
void check_step(const char* op, int64_t step);

// The numbers of a step of Adam, checked. For LAMB: lr = 1, and the weight decay not decoupled.
AdamStep adam_step(const char* op, double lr, double beta1, double beta2, double eps,
                   double weight_decay, int64_t step, bool decoupled, bool bias_correction);

}  // namespace ds
