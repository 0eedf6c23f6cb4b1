// Linear layers whose weights are small numbers with a scale per group: y = x W^T + bias.
//
// A packed weight of [out, depth] lies in blocks of kBlock = 16 outputs, so that one vector holds
// the same input's weight for many outputs: no sum across lanes, and every byte is read in order.
//
//   codes int8  [blocks, depth, 16]       int8: code of output 16 * block + lane
//   codes fp8   [blocks, depth, 16]       uint8: the same, of bytes of float8_e4m3fn, none NaN
//   codes int4  [blocks, depth / 8, 16]   int32: 8 codes of 4 bits, two's complement, of
//                                         consecutive inputs, the lowest bits first
//   codes fp6   [blocks, depth / 16, 3, 16] int32: 16 codes of 6 bits of consecutive inputs as one
//                                         stream of 96 bits, the lowest bits first
//   scales      [blocks, groups, 16]      fp32, bf16 or fp16
//   zeros       as scales, or none
//
// weight[o, k] = (value of code - zero) * scale of the group of k. Outputs behind the last have
// codes and scales of 0.
#pragma once

#include <stdint.h>

#include "common/float_type.h"
#include "common/isa.h"

namespace ds {

constexpr int kBlock = 16;

enum class WeightFormat { int8, int4, fp6, fp8 };

struct PackedWeight {
  const void* codes;
  const void* scales;
  const void* zeros;  // null: all are 0
  int64_t outputs;
  int64_t depth;
  int64_t group;  // inputs with a scale in common: a multiple of 16 that divides depth
  WeightFormat format;
  FloatType scale_type;

  // always_inline: its code must not be shared between files of other instruction sets.
  __attribute__((always_inline)) int64_t groups() const { return depth / group; }
};

struct WeightOnlyLinear {
  PackedWeight weight;
  const float* x;     // [rows, depth], as `prepare_rows` leaves it
  const float* sums;  // [rows, groups], of x over each group
  const void* bias;   // [outputs] of type `type`, or null
  void* y;            // [rows, outputs] of type `type`
  int64_t rows;
  FloatType type;
};

struct PrepareRows {
  const void* from;  // [rows, depth] of type `type`
  float* to;         // [rows, depth]
  float* sums;       // [rows, depth / group]
  int64_t depth;
  int64_t group;
  WeightFormat format;
  FloatType type;
};

// Part of a weight as a matrix: outputs [first_block * 16, ...) by inputs [begin, end).
struct DequantizeBlocks {
  PackedWeight weight;
  void* to;  // [outputs of the blocks, end - begin], fp32 or bf16
  int64_t first_block;
  int64_t begin;  // a multiple of 16, as is `end`
  int64_t end;
  FloatType type;
};

}  // namespace ds

// Rows [begin, end) of x in fp32, scaled as the decoder of this instruction set wants them.
DS_KERNEL(void, prepare_rows, const PrepareRows& call, int64_t begin, int64_t end)
// Outputs of blocks [begin, end), for all rows; `begin` is even.
DS_KERNEL(void, weight_only_linear_blocks, const WeightOnlyLinear& call, int64_t begin,
          int64_t end)
// Blocks [begin, end) of the weight.
DS_KERNEL(void, dequantize_blocks, const DequantizeBlocks& call, int64_t begin, int64_t end)
