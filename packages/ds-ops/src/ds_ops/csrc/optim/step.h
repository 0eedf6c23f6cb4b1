// One optimizer step, element by element, in one pass over memory.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/half.h"
#include "common/isa.h"

namespace ds {

static inline int64_t size_of(FloatType type) { return type == FloatType::fp32 ? 4 : 2; }

// What a step reads and writes: one element of each per parameter, all in the order of the
// parameter. A pass reads each stream once and writes each once.
struct StepStreams {
  void* param;
  const void* grad;
  void* states[2];  // as many as the optimizer has
  void* copy;       // receives the new parameter, rounded to the nearest; or null
  // Receive the bytes that param and states had before; undo[0] is null for a step that is final.
  void* undo[3];
  FloatType param_type;
  FloatType grad_type;
  FloatType state_type;
  FloatType copy_type;
  bool stochastic;  // round bf16 parameters and states by the random bits of rounding.h
  uint64_t seed;
  float grad_scale;  // the gradient is multiplied with it first; negative to maximize
  // What is only written goes around the caches: it would come back from memory only much later.
  bool around_cache;
};

// torch.optim.Adam (decoupled = false) and AdamW. With t the number of this step:
//   step_size = lr / (1 - beta1^t), root_scale = 1 / sqrt(1 - beta2^t)
struct AdamStep {
  float one_minus_beta1, beta2, one_minus_beta2;
  float eps;
  float step_size, root_scale;
  float decay;  // the parameter is multiplied with it: 1 - lr * weight_decay, or 1
  float l2;     // times the parameter is added to the gradient: weight_decay, or 0
};

struct LionStep {
  float beta1, beta2, one_minus_beta1, one_minus_beta2;
  float lr, decay;
};

struct AdagradStep {
  float lr;  // after its own decay
  float eps, l2;
};

struct SgdStep {
  float lr, l2;
  float momentum, one_minus_dampening;  // momentum 0: no buffer
  bool nesterov, first;                 // first: the buffer begins as the gradient
};


}  // namespace ds

// Elements [begin, end) of a step.
DS_KERNEL(void, adam_elements, const StepStreams& streams, const AdamStep& step, int64_t begin,
          int64_t end)
DS_KERNEL(void, lion_elements, const StepStreams& streams, const LionStep& step, int64_t begin,
          int64_t end)
DS_KERNEL(void, adagrad_elements, const StepStreams& streams, const AdagradStep& step,
          int64_t begin, int64_t end)
DS_KERNEL(void, sgd_elements, const StepStreams& streams, const SgdStep& step, int64_t begin,
          int64_t end)
// The first half of LAMB: the states advance, the parameter stays, and `copy` receives
// m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * param. `step_size` is
// 1 / (1 - beta1^t) here, `l2` the weight decay. sums = {sum of param^2, sum of update^2}.
DS_KERNEL(void, lamb_update_elements, const StepStreams& streams, const AdamStep& step,
          double* sums, int64_t begin, int64_t end)
// The second half: param -= factor * grad, where `grad` is what the first half left.
DS_KERNEL(void, lamb_apply_elements, const StepStreams& streams, float factor, int64_t begin,
          int64_t end)
// Puts back `undo` into the parameter and the first `states` states, and into `copy`.
DS_KERNEL(void, undo_elements, const StepStreams& streams, int states, int64_t begin, int64_t end)
