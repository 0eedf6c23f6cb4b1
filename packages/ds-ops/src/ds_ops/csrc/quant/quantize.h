// Block quantization: numbers in blocks of equal length, each with a scale in fp32 (and, if
// asymmetric, the fp32 number that code 0 stands for). Codes are packed as one stream of bits, the
// first code in the lowest bits; a block's codes fill whole bytes.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/half.h"
#include "common/isa.h"

namespace ds {

// How a code of `bits` bits is read. An integer is in two's complement if symmetric, else unsigned;
// a float has a sign, an exponent and `mantissa` bits.
struct BlockFormat {
  int bits;
  bool is_float;
  bool symmetric;
  int lowest;           // integers: the range of codes, as numbers
  int highest;
  int mantissa;         // floats: bits behind the point
  int min_exponent;     // of the smallest normal number, whose code is 1 << mantissa
  int largest_code;     // of the largest finite number
  int special_code;     // codes from here on are infinity and NaN; 1 << bits if there are none
  float inverse_max;    // 1 / (the largest number), so that scale = max |x| * inverse_max
};

// [ranks, blocks * block] codes with their scales: what `quantized_reduce` adds up.
struct QuantizedPieces {
  const uint8_t* codes;
  const float* scales;
  const float* zeros;  // null if symmetric
  BlockFormat format;
  int64_t ranks;
  float factor;  // of the sum: 1, or 1 / ranks for a mean
};

struct QuantizeCall {
  // What is quantized: numbers, or the sum of quantized pieces if `x` is null.
  const void* x;
  FloatType x_type;
  QuantizedPieces pieces;
  // What earlier calls left out, added to x; null if there is none.
  void* error;
  FloatType error_type;
  float beta;
  // The results.
  uint8_t* codes;
  float* scales;
  float* zeros;  // null if symmetric
  BlockFormat format;
  int64_t block;
  int64_t blocks;
  bool stochastic;
  uint64_t seed;
  // Of `outer * inner` equal parts, part (i, j) is stored as (j, i).
  int64_t outer;
  int64_t inner;
};

struct DequantizeCall {
  const uint8_t* codes;
  const float* scales;
  const float* zeros;  // null if symmetric
  void* y;
  FloatType y_type;
  BlockFormat format;
  int64_t block;
};

}  // namespace ds

// Blocks [begin, end), in the order of x.
DS_KERNEL(void, quantize_blocks, const QuantizeCall& call, int64_t begin, int64_t end)
DS_KERNEL(void, dequantize_blocks, const DequantizeCall& call, int64_t begin, int64_t end)
// The first of `count` numbers that is infinite or NaN; `count` if there is none.
DS_KERNEL(int64_t, first_not_finite, const float* from, int64_t count)
