// y = act(gate) * up, and its gradients, over contiguous spans of elements.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

enum class Activation { silu, gelu, gelu_tanh };

struct GatedForward {
  const void* gate;
  const void* up;
  void* y;
};

struct GatedBackward {
  const void* grad;
  const void* gate;
  const void* up;
  void* dgate;
  void* dup;
};

}  // namespace ds

DS_KERNEL(void, gated_activation_span, const GatedForward& span, int64_t count,
          Activation activation, FloatType type)
DS_KERNEL(void, gated_activation_backward_span, const GatedBackward& span, int64_t count,
          Activation activation, FloatType type)
