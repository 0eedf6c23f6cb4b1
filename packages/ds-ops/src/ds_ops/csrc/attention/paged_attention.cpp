#include "attention/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "attention/dense_prefill.h"
#include "attention/fp8_cache.h"
#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "paged_attention";
// Sequences with at most this many rows per key-value head are also cut along their keys, so that
// one long sequence keeps all threads busy. The cuts depend on the sequence alone, never on the
// threads or on the rest of the batch: its result is the same bit for bit in any company.
constexpr int64_t kFewTiles = 4 * kAttentionRows;
constexpr int64_t kKeysOfPart = 512;
// A window that every key is in; positions less it do not overflow.
constexpr int64_t kNoWindow = int64_t{1} << 40;

// --- Checks ---------------------------------------------------------------------------------------

// Caches may be views of one another's interleaved memory, but heads are contiguous.
void check_cache(const char* name, const Tensor& cache, const Tensor& q) {
  STD_TORCH_CHECK(cache.is_cpu(), kOp, ": ", name, ": not on a CPU, where this kernel runs");
  if (!is_fp8(cache)) check_dtype(kOp, name, cache, q.scalar_type());
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(3) == q.size(2), kOp, ": ", name, ": got shape ",
                  shape_text(cache), ", expected [blocks, block_size, kv_heads, ", q.size(2), "]");
  STD_TORCH_CHECK(cache.size(1) > 0 && cache.size(2) > 0 && q.size(1) % cache.size(2) == 0, kOp,
                  ": ", name, ": got ", cache.size(2), " heads in blocks of ", cache.size(1),
                  ", expected a divisor of q's ", q.size(1), " heads, and blocks of 1 or more");
  STD_TORCH_CHECK(cache.stride(3) == 1 || cache.numel() == 0, kOp, ": ", name,
                  ": the last dimension has stride ", cache.stride(3), ", expected 1");
}

void check_shapes(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                  const Tensor& block_table, const Tensor& lengths, const Tensor& starts) {
  check_float(kOp, "q", q);
  check_plain(kOp, "q", q);
  STD_TORCH_CHECK(q.dim() == 3 && q.size(2) >= kAttentionMinDim && q.size(2) <= kAttentionMaxDim,
                  kOp, ": q: got shape ", shape_text(q),
                  ", expected [tokens, heads, head size of 16 to 512]");
  check_cache("k_cache", k_cache, q);
  check_cache("v_cache", v_cache, q);
  check_dtype(kOp, "v_cache", v_cache, k_cache.scalar_type());
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(k_cache.size(dim) == v_cache.size(dim), kOp, ": v_cache: got shape ",
                    shape_text(v_cache), ", expected ", shape_text(k_cache));
    STD_TORCH_CHECK(k_cache.stride(dim) == v_cache.stride(dim) || k_cache.numel() == 0, kOp,
                    ": v_cache: stride ", v_cache.stride(dim), " in dimension ", dim,
                    ", expected k_cache's ", k_cache.stride(dim));
  }
  check_plain(kOp, "block_table", block_table);
  check_plain(kOp, "sequence_lengths", lengths);
  check_plain(kOp, "query_starts", starts);
  check_dtype(kOp, "block_table", block_table, ScalarType::Int);
  check_dtype(kOp, "sequence_lengths", lengths, ScalarType::Int);
  check_dtype(kOp, "query_starts", starts, ScalarType::Int);
  STD_TORCH_CHECK(block_table.dim() == 2, kOp, ": block_table: got shape ",
                  shape_text(block_table), ", expected [sequences, max_blocks]");
  const int64_t sequences = block_table.size(0);
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == sequences, kOp,
                  ": sequence_lengths: got shape ", shape_text(lengths), ", expected [", sequences,
                  "]");
  STD_TORCH_CHECK(starts.dim() == 1 && starts.size(0) == sequences + 1, kOp,
                  ": query_starts: got shape ", shape_text(starts), ", expected [", sequences + 1,
                  "]");
}

struct Sequence {
  int64_t query_start;
  int64_t queries;
  int64_t length;
};

// The sequences, with every number that leads to memory checked.
std::vector<Sequence> check_sequences(const Tensor& q, const Tensor& k_cache,
                                      const Tensor& block_table, const Tensor& lengths,
                                      const Tensor& starts) {
  const auto* table = static_cast<const int32_t*>(block_table.const_data_ptr());
  const auto* length = static_cast<const int32_t*>(lengths.const_data_ptr());
  const auto* start = static_cast<const int32_t*>(starts.const_data_ptr());
  const int64_t count = block_table.size(0), width = block_table.size(1);
  const int64_t blocks = k_cache.size(0), block_size = k_cache.size(1), tokens = q.size(0);
  STD_TORCH_CHECK(start[0] == 0 && start[count] == tokens, kOp, ": query_starts: from ", start[0],
                  " to ", start[count], ", expected from 0 to q's ", tokens, " tokens");
  std::vector<Sequence> found;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t queries = static_cast<int64_t>(start[s + 1]) - start[s];
    STD_TORCH_CHECK(queries >= 0, kOp, ": query_starts: falls from ", start[s], " to ",
                    start[s + 1], " at sequence ", s);
    STD_TORCH_CHECK(length[s] >= queries, kOp, ": sequence_lengths: got ", length[s],
                    " for sequence ", s, ", expected its ", queries, " queries or more");
    const int64_t used = (length[s] + block_size - 1) / block_size;
    STD_TORCH_CHECK(used <= width, kOp, ": sequence_lengths: got ", length[s], " for sequence ", s,
                    ", expected at most ", width * block_size, ": block_table has ", width,
                    " blocks of ", block_size, " for it");
    for (int64_t b = 0; queries > 0 && b < used; ++b) {
      const int32_t block = table[s * width + b];
      STD_TORCH_CHECK(block >= 0 && block < blocks, kOp, ": block_table: got ", block,
                      " for block ", b, " of sequence ", s, ", expected 0 to ", blocks - 1);
    }
    found.push_back({start[s], queries, length[s]});
  }
  // `start` rises and ends at `tokens`, so that no sequence reaches behind q.
  return found;
}

// --- Cutting the work -----------------------------------------------------------------------------

struct Piece {
  AttentionPart part;
  int64_t slot;  // its first row in the memory for parts that are combined later, or -1
};

struct Plan {
  std::vector<Piece> pieces;
  std::vector<AttentionResult> results;  // of pieces with a slot; sums, maxima not set
  std::vector<int64_t> result_slots;
  int64_t slots = 0;
  // What a thread needs for any of the pieces.
  int64_t scratch = 0;
  int64_t own_slots = 0;
};

int64_t padded(int64_t rows) {
  return (rows + kAttentionRowStep - 1) / kAttentionRowStep * kAttentionRowStep;
}

// The tile of rows from `first` on of a sequence, by pieces of up to `heads` key-value heads.
void plan_tile(const PagedAttention& call, int64_t index, const Sequence& sequence, int64_t first,
               int64_t heads, Plan& plan) {
  const int64_t group = call.heads / call.kv_heads;
  const int64_t all_rows = sequence.queries * group;
  const int64_t rows = all_rows - first < kAttentionRows ? all_rows - first : kAttentionRows;
  const int64_t history = sequence.length - sequence.queries;
  const int64_t from = history + first / group - call.window + 1;
  const int64_t begin = from > 0 ? from : 0;
  const int64_t end = history + (first + rows - 1) / group + 1;
  const int64_t first_cut = begin / kKeysOfPart * kKeysOfPart;
  const bool split = all_rows <= kFewTiles && end - first_cut > kKeysOfPart;
  const int64_t parts = split ? (end - first_cut + kKeysOfPart - 1) / kKeysOfPart : 1;
  const int64_t slots = padded(rows);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t cut = split ? first_cut + part * kKeysOfPart : begin;
    for (int64_t head = 0; head < call.kv_heads; head += heads) {
      const int64_t stop = head + heads < call.kv_heads ? head + heads : call.kv_heads;
      plan.pieces.push_back({{index, head, stop, sequence.query_start, history, first, rows,
                              cut > begin ? cut : begin,
                              split && cut + kKeysOfPart < end ? cut + kKeysOfPart : end,
                              parts * slots, nullptr, nullptr, nullptr},
                             split ? plan.slots + (head * parts + part) * slots : -1});
    }
  }
  plan.scratch = std::max(plan.scratch, attention_scratch(call.dim, rows, heads));
  if (!split) {
    plan.own_slots = std::max(plan.own_slots, heads * slots);
    return;
  }
  for (int64_t head = 0; head < call.kv_heads; ++head) {
    plan.results.push_back({head, sequence.query_start, first, rows, parts, slots, nullptr, nullptr,
                            nullptr});
    plan.result_slots.push_back(plan.slots);
    plan.slots += parts * slots;
  }
}

// Key-value heads of a piece with few rows: all, which reads memory in order, unless there would be
// too few pieces for the threads. Results do not depend on it.
int64_t heads_of_piece(const PagedAttention& call, const std::vector<Sequence>& sequences) {
  const int64_t threads = torch::stable::get_num_threads();
  int64_t pieces = 0;
  for (const Sequence& sequence : sequences) {
    if (sequence.queries) pieces += 1 + std::min(sequence.length, call.window) / kKeysOfPart;
  }
  int64_t heads = call.kv_heads;
  for (; heads > 1 && threads > 1 && pieces < 4 * threads; heads = (heads + 1) / 2) pieces *= 2;
  return heads;
}

// Long prefills first and from their ends, which see the most keys: the last pieces are small, so
// that threads finish together.
Plan make_plan(const PagedAttention& call, const std::vector<Sequence>& sequences) {
  const int64_t group = call.heads / call.kv_heads;
  const int64_t few_heads = heads_of_piece(call, sequences);
  Plan plan;
  for (const bool many : {true, false}) {
    for (size_t s = 0; s < sequences.size(); ++s) {
      const int64_t rows = sequences[s].queries * group;
      if (rows == 0 || many != (rows > kFewTiles)) continue;
      for (int64_t first = (rows - 1) / kAttentionRows * kAttentionRows; first >= 0;
           first -= kAttentionRows) {
        plan_tile(call, static_cast<int64_t>(s), sequences[s], first,
                  rows <= kAttentionFewRows ? few_heads : 1, plan);
      }
    }
  }
  return plan;
}

// --- Computing ------------------------------------------------------------------------------------

struct Freed {
  void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Floats = std::unique_ptr<float[], Freed>;

Floats floats(int64_t count) {
  return Floats(static_cast<float*>(
      ::operator new[](static_cast<size_t>(count) * sizeof(float), std::align_val_t(64))));
}

// `body(next)` on each thread; `next()` is the next of [0, count) that no thread has taken, or -1.
// Which thread computes what differs from call to call: each must be a result of its own.
template <typename Body>
void take_turns(int64_t count, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> taken{0};
  parallel(threads < count ? threads : count, 1, [&](int64_t, int64_t) {
    body([&]() -> int64_t {
      const int64_t mine = taken.fetch_add(1, std::memory_order_relaxed);
      return mine < count ? mine : -1;
    });
  });
}

void compute(const PagedAttention& call, const Plan& plan) {
  const auto kernel = DS_BEST(attention_part);
  const auto combine = DS_BEST(attention_combine);
  const int64_t stride = attention_stride(call.dim);
  const Floats kept = floats(plan.slots * (stride + 2));
  take_turns(static_cast<int64_t>(plan.pieces.size()), [&](auto&& next) {
    const Floats scratch = floats(plan.scratch);
    const Floats own = floats(plan.own_slots * (stride + 2));
    for (int64_t i = next(); i >= 0; i = next()) {
      AttentionPart part = plan.pieces[i].part;
      const bool whole = plan.pieces[i].slot < 0;
      const int64_t slot = whole ? 0 : plan.pieces[i].slot;
      const int64_t slots = whole ? plan.own_slots : plan.slots;
      float* memory = whole ? own.get() : kept.get();
      part.sums = memory + slot * stride;
      part.maxima = memory + slots * stride + slot;
      part.weights = memory + slots * (stride + 1) + slot;
      kernel(call, part, scratch.get());
      for (int64_t head = part.kv_begin; whole && head < part.kv_end; ++head) {
        const int64_t at = (head - part.kv_begin) * part.head_slots;
        combine(call, {head, part.query_start, part.first_row, part.rows, 1, 0,
                       part.sums + at * stride, part.maxima + at, part.weights + at});
      }
    }
  });
  parallel(static_cast<int64_t>(plan.results.size()), 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      AttentionResult result = plan.results[i];
      const int64_t slot = plan.result_slots[i];
      result.sums = kept.get() + slot * stride;
      result.maxima = kept.get() + plan.slots * stride + slot;
      result.weights = kept.get() + plan.slots * (stride + 1) + slot;
      combine(call, result);
    }
  });
}

// Computes the sequences that torch's kernel is faster for, and takes their queries out.
void compute_dense(const PagedAttention& call, const Tensor& q, const Tensor& k_cache,
                   const Tensor& v_cache, std::vector<Sequence>& sequences, Tensor& out) {
  if (!dense_prefill_is_faster(q) || call.softcap > 0) return;
  if (call.cache_type != CacheType::as_q) return;
  for (size_t s = 0; s < sequences.size(); ++s) {
    Sequence& sequence = sequences[s];
    const int64_t rows = sequence.queries * (call.heads / call.kv_heads);
    if (rows <= kFewTiles || call.window < sequence.length) continue;
    dense_prefill(q, k_cache, v_cache,
                  {sequence.query_start, sequence.queries, sequence.length,
                   call.table + static_cast<int64_t>(s) * call.table_width, call.scale},
                  out);
    sequence.queries = 0;
  }
}

CacheType cache_type(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Float8_e4m3fn:
      return CacheType::e4m3;
    case ScalarType::Float8_e5m2:
      return CacheType::e5m2;
    default:
      return CacheType::as_q;
  }
}

std::vector<float> scales_by_head(const char* name, const std::optional<Tensor>& scale,
                                  const Tensor& cache) {
  const Scales scales = check_scale(kOp, name, scale, cache);
  std::vector<float> found;
  for (int64_t head = 0; head < cache.size(2); ++head) found.push_back(scales.of(head));
  return found;
}

Tensor paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table,
                       Tensor sequence_lengths, Tensor query_starts, double scale,
                       std::optional<int64_t> window, std::optional<double> softcap,
                       std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  check_shapes(q, k_cache, v_cache, block_table, sequence_lengths, query_starts);
  STD_TORCH_CHECK(std::isfinite(scale), kOp, ": scale: got ", scale, ", expected a finite number");
  STD_TORCH_CHECK(!window || *window >= 1, kOp, ": window: got ", window.value_or(0),
                  ", expected 1 or more");
  STD_TORCH_CHECK(!softcap || (std::isfinite(*softcap) && *softcap > 0), kOp, ": softcap: got ",
                  softcap.value_or(0), ", expected more than 0");
  auto sequences = check_sequences(q, k_cache, block_table, sequence_lengths, query_starts);
  const std::vector<float> k_scales = scales_by_head("k_scale", k_scale, k_cache);
  const std::vector<float> v_scales = scales_by_head("v_scale", v_scale, v_cache);
  Tensor out = torch::stable::empty_like(q);
  const PagedAttention call{q.const_data_ptr(),
                            k_cache.const_data_ptr(),
                            v_cache.const_data_ptr(),
                            out.mutable_data_ptr(),
                            static_cast<const int32_t*>(block_table.const_data_ptr()),
                            block_table.size(1),
                            k_cache.size(1),
                            k_cache.stride(0),
                            k_cache.stride(1),
                            k_cache.stride(2),
                            q.size(1),
                            k_cache.size(2),
                            q.size(2),
                            std::min(window.value_or(kNoWindow), kNoWindow),
                            static_cast<float>(scale),
                            static_cast<float>(softcap.value_or(0.0)),
                            float_type(q),
                            cache_type(k_cache),
                            k_scales.data(),
                            v_scales.data()};
  if (q.numel() == 0) return out;
  compute_dense(call, q, k_cache, v_cache, sequences, out);
  compute(call, make_plan(call, sequences));
  return out;
}

DS_OP(paged_attention, paged_attention);

}  // namespace
}  // namespace ds
