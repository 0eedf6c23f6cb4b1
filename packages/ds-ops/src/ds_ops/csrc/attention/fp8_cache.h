// What operators on caches of 8-bit floats share.
#pragma once

#include "common/op.h"

namespace ds {

inline bool is_fp8(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float8_e4m3fn || t.scalar_type() == ScalarType::Float8_e5m2;
}

// By what numbers of a cache are multiplied: one for all heads or one per head; none: 1.
struct Scales {
  const float* values = nullptr;
  int64_t step = 0;

  float of(int64_t head) const { return values ? values[head * step] : 1.0f; }
};

inline Scales check_scale(const char* op, const char* name, const std::optional<Tensor>& scale,
                          const Tensor& cache) {
  if (!scale) return {};
  STD_TORCH_CHECK(is_fp8(cache), op, ": ", name, ": got a tensor for caches of ",
                  dtype_name(cache.scalar_type()), ", expected None: only fp8 is scaled");
  check_plain(op, name, *scale);
  check_dtype(op, name, *scale, ScalarType::Float);
  const int64_t heads = cache.size(2);
  STD_TORCH_CHECK(scale->dim() == 1 && (scale->size(0) == 1 || scale->size(0) == heads), op, ": ",
                  name, ": got shape ", shape_text(*scale), ", expected [1] or [", heads, "]");
  return {static_cast<const float*>(scale->const_data_ptr()), scale->size(0) == 1 ? 0 : 1};
}

}  // namespace ds
