// Routing of tokens to experts: probabilities from logits, the k best of them, their weights.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/half.h"
#include "common/isa.h"

namespace ds {

struct MoeGate {
  const void* logits;  // [tokens, experts], of type `type`
  const float* bias;   // [experts], or null
  float* weights;      // [tokens, k]
  int32_t* indices;    // [tokens, k]
  float* probabilities;  // [tokens, experts]
  int64_t experts;
  int64_t k;
  int64_t groups;      // experts are chosen from the best `top_groups` of them
  int64_t top_groups;
  float scale;
  bool normalize;
  bool sigmoid;
  FloatType type;
};

struct MoeGateBackward {
  const float* grad_weights;        // [tokens, k], or null
  const float* grad_probabilities;  // [tokens, experts], or null
  const float* probabilities;       // [tokens, experts]
  const int32_t* indices;           // [tokens, k], each in [0, experts)
  void* grad_logits;                // [tokens, experts], of type `type`
  int64_t experts;
  int64_t k;
  float scale;
  bool normalize;
  bool sigmoid;
  FloatType type;
};

// Added to the sum of weights before they are divided by it.
constexpr float kGateTiny = 1e-20f;

// Floats of scratch memory for a row: whole vectors of every instruction set.
inline constexpr int64_t gate_scratch(int64_t experts, int64_t groups) {
  return (experts + 15) / 16 * 16 + (groups + 15) / 16 * 16;
}

}  // namespace ds

// Tokens [begin, end); adds how often each expert is chosen to `counts` [experts].
DS_KERNEL(void, moe_gate_rows, const MoeGate& call, int64_t begin, int64_t end, int32_t* counts,
          float* scratch)
DS_KERNEL(void, moe_gate_backward_rows, const MoeGateBackward& call, int64_t begin, int64_t end,
          float* scratch)
