// Attention of ragged sequences over keys and values that lie in blocks of a cache.
//
// The work is cut into parts: some rows (a row is one query token and one head) by a range of keys
// of some key-value heads. A part yields, for each row, the unnormalized sum of values weighted by
// e^(score - max), with its max and the sum of the weights; parts of the same rows are combined.
// Rows are ordered token by token, and inside a token by the heads that share the key-value head
// (G of them), so that each key is read once for all of these.
#pragma once

#include <stdint.h>

#include "attention/fp8.h"
#include "common/float_type.h"
#include "common/half.h"
#include "common/isa.h"

namespace ds {

// What a cache holds: q's dtype, or 8-bit floats.
enum class CacheType { as_q, e4m3, e5m2 };

struct PagedAttention {
  const void* q;  // [tokens, heads, dim]
  const void* k;  // [blocks, block_size, kv_heads, dim], with the strides below, in elements
  const void* v;
  void* out;             // [tokens, heads, dim]
  const int32_t* table;  // [sequences, table_width]
  int64_t table_width;
  int64_t block_size;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  int64_t window;  // keys that a query sees, itself included; at least 1
  float scale;
  float softcap;  // 0: none
  FloatType type;  // of q and out
  CacheType cache_type;
  const float* k_scales;  // by which numbers of a key-value head are multiplied, one for each head
  const float* v_scales;
};

struct AttentionPart {
  int64_t sequence;
  int64_t kv_begin;     // its key-value heads
  int64_t kv_end;
  int64_t query_start;  // of the sequence, in q
  int64_t history;      // keys before its first query
  int64_t first_row;
  int64_t rows;
  int64_t key_begin;
  int64_t key_end;
  int64_t head_slots;  // from a row of one head to the same of the next
  float* sums;         // a row of `attention_stride(dim)` for each slot
  float* maxima;       // one for each slot
  float* weights;      // one for each slot: sum of e^(score - max)
};

struct AttentionResult {
  int64_t kv_head;
  int64_t query_start;
  int64_t first_row;
  int64_t rows;
  int64_t parts;
  int64_t part_rows;  // from a part's row to the same row of the next part
  const float* sums;
  const float* maxima;
  const float* weights;
};

constexpr int64_t kAttentionRows = 64;    // most rows of a part
constexpr int64_t kAttentionRowStep = 8;  // rows are computed in steps of this: room for all of it
constexpr int64_t kAttentionKeys = 64;    // keys that are computed at a time
constexpr int64_t kAttentionFewRows = 8;  // up to these, keys are used where they lie
constexpr int64_t kAttentionMinDim = 16;  // the widest vector
constexpr int64_t kAttentionMaxDim = 512;

// Floats from one row of sums to the next: whole vectors of every instruction set.
static constexpr int64_t attention_stride(int64_t dim) { return (dim + 15) / 16 * 16; }

// Floats of scratch memory that a part with so many rows and heads needs.
static constexpr int64_t attention_scratch(int64_t dim, int64_t rows, int64_t heads) {
  return rows <= kAttentionFewRows
             ? heads * rows * (attention_stride(dim) + kAttentionKeys + 1)
             : kAttentionRows * (attention_stride(dim) + kAttentionKeys) +
                   kAttentionKeys * 2 * attention_stride(dim);
}

}  // namespace ds

// One part; `scratch` begins at a multiple of 64 bytes.
DS_KERNEL(void, attention_part, const PagedAttention& call, const AttentionPart& part,
          float* scratch)
// Write the results of some rows from all their parts.
DS_KERNEL(void, attention_combine, const PagedAttention& call, const AttentionResult& result)
