// The element type of a tensor, as a value that an operator hands to a kernel.
#pragma once

namespace ds {

enum class FloatType { fp32, bf16, fp16 };

}  // namespace ds
