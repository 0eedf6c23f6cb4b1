// The element type of a tensor, as a value that an operator hands to a kernel.
#pragma once

#include "common/half.h"

namespace ds {

enum class FloatType { fp32, bf16, fp16 };

// What `body(T{})` returns, with T = float, bf16 or fp16 as `type` says. static: see half.h.
template <typename Body>
static inline __attribute__((always_inline)) auto by_float_type(FloatType type, const Body& body) {
  switch (type) {
    case FloatType::fp32:
      return body(float{});
    case FloatType::bf16:
      return body(bf16{});
    default:
      return body(fp16{});
  }
}

}  // namespace ds
