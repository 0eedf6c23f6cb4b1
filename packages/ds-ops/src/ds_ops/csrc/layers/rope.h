// Rotation of pairs of elements of each head by an angle of its position.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

// Rows of `width` elements, as three nested loops with strides in elements: (batch, position, head)
// or (batch, head, position), whichever way x lies in memory.
struct Rope {
  const void* x;
  void* y;           // may be x
  const float* cos;  // [positions, pairs] or [batch, positions, pairs]
  const float* sin;
  int64_t size[3];
  int64_t x_stride[3];
  int64_t y_stride[3];
  int64_t table_stride[3];
  int64_t width;
  int64_t pairs;      // 2 * pairs <= width; the elements behind them are copied
  bool interleaved;   // pairs are (0, 1), (2, 3)...; else (0, pairs), (1, pairs + 1)...
  bool inverse;       // rotate back
  FloatType type;
};

}  // namespace ds

// Rows [begin, end), counted with the last loop as the fastest.
DS_KERNEL(void, rope_rows, const Rope& call, int64_t begin, int64_t end)
