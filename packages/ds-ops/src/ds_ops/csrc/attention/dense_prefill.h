// Attention of one long bf16 prefill by torch's own kernel, where the processor has matrix units.
//
// Those (AMX) multiply bf16 several times as fast as vectors of fp32 do, and torch's kernel uses
// them: it is worth to gather the keys and values of a sequence for it.
#pragma once

#include "common/op.h"

namespace ds {

struct DensePrefill {
  int64_t query_start;
  int64_t queries;
  int64_t length;         // keys; the queries are the last of them
  const int32_t* blocks;  // of the keys, checked
  double scale;
};

// Whether it pays for queries of this dtype on this processor.
bool dense_prefill_is_faster(const Tensor& q);

// Writes rows [query_start, query_start + queries) of `out`.
void dense_prefill(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const DensePrefill& call, Tensor& out);

}  // namespace ds
