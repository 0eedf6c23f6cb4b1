// The signs of numbers, eight to a byte (the first in the lowest bit, 1 for >= 0), and one scale
// per chunk.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "quant/quantize.h"

namespace ds {

struct SignCall {
  const void* x;
  FloatType x_type;
  void* error;  // null if there is none; added to x
  FloatType error_type;
  bool squares;  // sum x^2, not |x|
};

}  // namespace ds

// Numbers [begin, begin + count) of x + error; returns the sum of |.| or squares. `count` is at
// most kSignPart. Writes the signs to `codes`, (count + 7) / 8 bytes, filled up with zeros.
DS_KERNEL(double, pack_signs, const SignCall& call, int64_t begin, int64_t count, uint8_t* codes)
// error = (x + error) - (scale, with the sign of x + error), of the same numbers.
DS_KERNEL(void, update_sign_error, const SignCall& call, int64_t begin, int64_t count, float scale)
// y[begin + i] = scale with the sign of bit i.
DS_KERNEL(void, unpack_signs, const uint8_t* codes, void* y, FloatType y_type, int64_t begin,
          int64_t count, float scale)

namespace ds {
// Numbers are worked on in parts of this many, whose sums are added in order: results do not depend
// on the number of threads. A multiple of 8.
constexpr int64_t kSignPart = 4096;
}  // namespace ds
