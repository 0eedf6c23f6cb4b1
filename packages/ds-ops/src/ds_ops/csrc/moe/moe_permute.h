// Rows of experts back to tokens: out[token] = sum over slots of weight * y[row_map[token, slot]],
// and its gradients. A row of -1 is nowhere.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/half.h"
#include "common/isa.h"

namespace ds {

struct MoeUnpermute {
  const void* y;           // [rows, width], of type `type`
  const int32_t* row_map;  // [tokens, k], each in [-1, rows)
  const float* weights;    // [tokens, k], or null: 1
  void* out;               // [tokens, width]
  int64_t k;
  int64_t width;
  FloatType type;
};

struct MoeUnpermuteBackward {
  const void* grad;        // [tokens, width], of type `type`
  const void* y;           // [rows, width]; not looked at without weights
  const int32_t* row_map;  // [tokens, k], each in [-1, rows) and none but -1 twice
  const float* weights;    // [tokens, k], or null
  void* dy;                // [rows, width]
  float* dweights;         // [tokens, k], with weights
  int64_t k;
  int64_t width;
  FloatType type;
};

}  // namespace ds

// Tokens [begin, end).
DS_KERNEL(void, moe_unpermute_rows, const MoeUnpermute& call, int64_t begin, int64_t end)
DS_KERNEL(void, moe_unpermute_backward_rows, const MoeUnpermuteBackward& call, int64_t begin,
          int64_t end)
