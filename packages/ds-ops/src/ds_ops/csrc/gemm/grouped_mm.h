// Products of a few rows with a matrix that is read once: out = a b, summed in fp32.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

constexpr int kRowsAtOnce = 4;  // rows that the kernel takes at once

struct FewRows {
  const float* a;  // [4, depth]; rows behind the last are 0
  const void* b;   // element (k, n) at k * step_k + n * step_n, one of which is 1
  void* out;       // row r, column n at r * width + n
  int64_t rows;    // 1 to 4
  int64_t depth;
  int64_t width;
  int64_t step_k;
  int64_t step_n;
  FloatType type;  // of b and out
};

}  // namespace ds

// Columns [begin, end) of out.
DS_KERNEL(void, multiply_few_rows, const FewRows& call, int64_t begin, int64_t end)
