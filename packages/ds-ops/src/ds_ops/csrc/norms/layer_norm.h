// Rows of length `width`: y = (x - mean) * scale * weight + bias with scale = 1 / sqrt(var + eps).
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

struct LayerNormForward {
  const void* x;         // [rows, width], of type `type`
  const float* weight;   // [width]
  const float* bias;     // [width] or null
  const void* residual;  // [rows, width] or null
  void* y;               // [rows, width]
  void* sum;             // [rows, width]: x + residual, what is then normalized; null as residual
  float* mean;           // [rows]
  float* scale;          // [rows]
  int64_t width;
  float eps;
  FloatType type;
};

struct LayerNormBackward {
  const void* grad;      // [rows, width], of type `type`
  const void* x;         // [rows, width]: what was normalized
  const float* weight;   // [width]
  const float* mean;     // [rows]
  const float* scale;    // [rows]
  const void* grad_sum;  // [rows, width] or null: added to dx
  void* dx;              // [rows, width]
  int64_t width;
  FloatType type;
};

}  // namespace ds

// Rows [begin, end) of the forward.
DS_KERNEL(void, layer_norm_rows, const LayerNormForward& call, int64_t begin, int64_t end)
// Rows [begin, end) of the backward; added to: `sums` [2 * width], of the weight, then of the bias.
DS_KERNEL(void, layer_norm_backward_rows, const LayerNormBackward& call, float* sums,
          int64_t begin, int64_t end)
