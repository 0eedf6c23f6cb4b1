// The gradient of a weight that all rows share: a sum over rows, the same bit for bit with any
// number of threads.
//
// Rows are cut into fixed parts; each part adds up its rows in a row of its own, and these are
// added in order.
#pragma once

#include <stdint.h>

#include "common/isa.h"

// total[i] = sum over parts of sums[part * stride + i], i in [begin, end); added in order.
DS_KERNEL(void, add_up_parts, const float* sums, int64_t parts, int64_t stride, float* total,
          int64_t begin, int64_t end)
