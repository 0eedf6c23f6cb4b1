// What the operators of this folder ask of tensors.
#pragma once

#include <vector>

#include "common/op.h"
#include "quant/quantize.h"

namespace ds {

inline ElementType element_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return ElementType::fp32;
    case ScalarType::BFloat16:
      return ElementType::bf16;
    default:
      return ElementType::fp16;
  }
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < t.dim(); ++dim) shape.push_back(t.size(dim));
  return shape;
}

// Of `count` elements, in fp32 or the dtype of what it belongs to.
inline void check_error(const char* op, const Tensor& error, int64_t count, ScalarType beside) {
  check_plain(op, "error", error);
  const ScalarType dtype = error.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == beside, op, ": error: got ",
                  dtype_name(dtype), ", expected torch.float32 or ", dtype_name(beside));
  check_numel(op, "error", error, count);
}

}  // namespace ds
