// Rows of length `width`: y = x * scale * weight with scale = 1 / sqrt(mean(x^2) + eps).
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

struct RmsNormForward {
  const void* x;         // [rows, width], of type `type`
  const float* weight;   // [width]
  const void* residual;  // [rows, width] or null
  void* y;               // [rows, width]
  void* sum;             // [rows, width]: x + residual, what is then normalized; null as residual
  float* scale;          // [rows]
  int64_t width;
  float eps;
  FloatType type;
};

struct RmsNormBackward {
  const void* grad;      // [rows, width], of type `type`
  const void* x;         // [rows, width]: what was normalized
  const float* weight;   // [width]
  const float* scale;    // [rows]
  const void* grad_sum;  // [rows, width] or null: added to dx
  void* dx;              // [rows, width]
  int64_t width;
  FloatType type;
};

}  // namespace ds

// Rows [begin, end) of the forward.
DS_KERNEL(void, rms_norm_rows, const RmsNormForward& call, int64_t begin, int64_t end)
// Rows [begin, end) of the backward; `dweight` [width] is added to.
DS_KERNEL(void, rms_norm_backward_rows, const RmsNormBackward& call, float* dweight,
          int64_t begin, int64_t end)
