// Adam with eight bits per state: 256 elements at a time share a scale.
//
// The state of a block, with `a` its scale for exp_avg and `b` for exp_avg_sq (fp32, one for each
// 256 elements and one for the rest), and uint8 codes of one element each. Both codes are the high
// bits of a float: T(n) = the float whose bits are n << 20 = (1 + (n % 8) / 8) * 2^(n / 8 - 127).
//
//   exp_avg     m = a * T(c + 889), or 0 for c = 0; c the low 7 bits, negative if bit 7 is set
//   exp_avg_sq  v = b * T(c + 761)
//
// The highest codes, 127 and 255, stand for the scale itself. Neighbours differ by 6 to 12 %, down
// to 2^-15.75 of the scale for m and 2^-31.9 for v, whose elements may differ much in a block. A
// second moment is never 0 while that of another element of its block is not: dividing by the root
// of one that was rounded to 0 would make a huge step. State 0: codes 0, scales 0.
//
// A step decodes m and v, and computes m', v' and the parameter in fp32 as Adam does, with m' and
// v' not rounded. Then, over the block, a' = max |m'| and b' = max v', each raised to 2^-126 unless
// it is 0, and with x and y the bits, as integers, of |m'| / a' and v' / b' (to 2^-22, and never
// above 1; both 0 where the scale is 0):
//
//   c_m = max(((x + t) >> 20) - 889, 0), and 128 more if m' has the sign bit
//   c_v = max(((y + w) >> 20) - 761, 0)
//
// t = w = 2^19 without a seed: the nearest value. With a seed the moments are right in expectation:
// elements 2 n and 2 n + 1 share the random bits that rounding.h has for n, as
//
//   element 2 n:      t = bits & 0xfffff, w = bits >> 12, and bits & 0xffff for a bf16 parameter
//   element 2 n + 1:  t = bits >> 12, w = bits & 0xfffff, and bits >> 16 for a bf16 parameter
//
// Without a seed v cannot follow a change of less than half
// a step, which with beta2 = 0.999 is most: after a gradient becomes five times smaller, v stays.
// Train with one.
//
// A NaN or infinity in m' or v' becomes the scale of its block; its codes mean nothing any more.
//
// Source: blocks as in Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"; the
// code of our own, in place of their table, takes an addition and a shift.
#pragma once

#include <stdint.h>

#include "common/isa.h"
#include "optim/step.h"

namespace ds {

constexpr int64_t kCodeBlock = 256;

struct CodedStates {
  uint8_t* mean;
  float* mean_scales;
  uint8_t* square;
  float* square_scales;
};

}  // namespace ds

// Elements [begin, end); `begin` is a multiple of kCodeBlock. The streams' states are not used.
DS_KERNEL(void, adam8bit_elements, const StepStreams& streams, const CodedStates& states,
          const AdamStep& step, int64_t begin, int64_t end)
