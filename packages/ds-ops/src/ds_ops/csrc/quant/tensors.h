// What the operators of this folder ask of tensors.
#pragma once

#include <string>
#include <vector>

#include "common/op.h"
#include "quant/quantize.h"

namespace ds {

inline FloatType element_type(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return FloatType::fp32;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    default:
      return FloatType::fp16;
  }
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < t.dim(); ++dim) shape.push_back(t.size(dim));
  return shape;
}

// Of that shape, in fp32 or the dtype of what it belongs to.
inline void check_error(const char* op, const Tensor& error, const std::vector<int64_t>& shape,
                        ScalarType beside) {
  check_plain(op, "error", error);
  const ScalarType dtype = error.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == beside, op, ": error: got ",
                  dtype_name(dtype), ", expected torch.float32 or ", dtype_name(beside));
  if (shape_of(error) == shape) return;
  std::string expected;
  for (const int64_t size : shape) {
    expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  }
  STD_TORCH_CHECK(false, op, ": error: got shape ", shape_text(error), ", expected [", expected,
                  "]");
}

}  // namespace ds
