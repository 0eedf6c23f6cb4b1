#include <algorithm>
#include <array>
#include <cstring>
#include <utility>
#include <vector>

#include "attention/fp8.h"
#include "attention/fp8_cache.h"
#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "write_kv_cache_";
// Tokens of fewer bytes in all than this cost more to hand to a thread than to copy.
constexpr int64_t kGrainBytes = 65536;

void check_tokens(const char* name, const Tensor& tokens, const char* cache_name,
                  const Tensor& cache) {
  STD_TORCH_CHECK(tokens.is_cpu() && cache.is_cpu(), kOp, ": ", name,
                  ": not on a CPU, where this kernel runs");
  if (!is_fp8(cache)) check_dtype(kOp, cache_name, cache, tokens.scalar_type());
  STD_TORCH_CHECK(cache.dim() == 4 && cache.size(1) > 0, kOp, ": ", cache_name, ": got shape ",
                  shape_text(cache), ", expected [blocks, block_size, kv_heads, head size]");
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(1) == cache.size(2) &&
                      tokens.size(2) == cache.size(3),
                  kOp, ": ", name, ": got shape ", shape_text(tokens), ", expected [tokens, ",
                  cache.size(2), ", ", cache.size(3), "]");
  // A token may be a part of a longer row (as in a fused q, k, v), but is itself contiguous.
  STD_TORCH_CHECK(tokens.numel() == 0 || (tokens.stride(2) == 1 &&
                                          (tokens.size(1) == 1 ||
                                           tokens.stride(1) == tokens.size(2))),
                  kOp, ": ", name, ": a token's heads are not contiguous; call .contiguous() on it");
  STD_TORCH_CHECK(cache.numel() == 0 || cache.stride(3) == 1, kOp, ": ", cache_name,
                  ": the last dimension has stride ", cache.stride(3), ", expected 1");
}

// From the first byte of a tensor with strides to behind its last.
struct Extent {
  const char* begin;
  const char* end;
};

Extent extent(const Tensor& t) {
  const char* begin = static_cast<const char*>(t.const_data_ptr());
  int64_t last = 0;
  for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
  return {begin, begin + (last + 1) * t.element_size()};
}

void check_not_within(const char* name, const Tensor& tokens, const char* cache_name,
                      const Tensor& cache) {
  if (tokens.numel() == 0 || cache.numel() == 0) return;
  const Extent a = extent(tokens), b = extent(cache);
  STD_TORCH_CHECK(a.end <= b.begin || b.end <= a.begin, kOp, ": ", name, " and ", cache_name,
                  " overlap in memory, and the second is written; give tensors of their own");
}

// The dimensions outside of a row, the innermost in memory first.
std::array<int64_t, 3> by_stride(const Tensor& cache) {
  std::array<int64_t, 3> order{0, 1, 2};
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return cache.stride(a) < cache.stride(b); });
  return order;
}

// Each row of a cache has memory of its own: in the order of their strides, no dimension steps over
// less than the ones inside it take.
void check_own_memory(const char* name, const Tensor& cache) {
  int64_t room = cache.size(3);
  for (const int64_t dim : by_stride(cache)) {
    if (cache.size(dim) == 1) continue;
    STD_TORCH_CHECK(cache.stride(dim) >= room, kOp, ": ", name, ": elements of dimension ", dim,
                    " overlap (stride ", cache.stride(dim), ", expected ", room, " or more)");
    room += cache.stride(dim) * (cache.size(dim) - 1);
  }
}

// The caches may lie side by side in one tensor: then in each step of one of its dimensions, from
// the innermost in memory on, there is room for the keys and, behind them, the values.
bool side_by_side(const Tensor& first, const Tensor& second) {
  const int64_t size = first.element_size();
  const int64_t bytes = static_cast<const char*>(second.const_data_ptr()) -
                        static_cast<const char*>(first.const_data_ptr());
  if (bytes % size != 0) return false;
  const int64_t apart = bytes / size;
  int64_t room = first.size(3);
  for (const int64_t dim : by_stride(first)) {
    if (first.size(dim) == 1) continue;
    if (first.stride(dim) != second.stride(dim)) return false;
    if (apart >= room && apart + room <= first.stride(dim)) return true;
    room += first.stride(dim) * (first.size(dim) - 1);
  }
  return false;
}

void check_caches(const Tensor& k_cache, const Tensor& v_cache) {
  check_dtype(kOp, "v_cache", v_cache, k_cache.scalar_type());
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(k_cache.size(dim) == v_cache.size(dim), kOp, ": v_cache: got shape ",
                    shape_text(v_cache), ", expected ", shape_text(k_cache));
  }
  if (k_cache.numel() == 0) return;
  check_own_memory("k_cache", k_cache);
  check_own_memory("v_cache", v_cache);
  const Extent k = extent(k_cache), v = extent(v_cache);
  STD_TORCH_CHECK(k.end <= v.begin || v.end <= k.begin || side_by_side(k_cache, v_cache) ||
                      side_by_side(v_cache, k_cache),
                  kOp, ": k_cache and v_cache overlap in memory; give tensors of their own");
}

// Where each token goes is checked before any is written: in range, and no slot named twice.
void check_slots(const int64_t* slots, int64_t tokens, int64_t room) {
  std::vector<bool> taken(static_cast<size_t>(room));
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t slot = slots[token];
    STD_TORCH_CHECK(slot >= -1 && slot < room, kOp, ": slots: got ", slot, " for token ", token,
                    ", expected 0 to ", room - 1, ", or -1 to skip it");
    if (slot < 0) continue;
    STD_TORCH_CHECK(!taken[slot], kOp, ": slots: got ", slot, " for token ", token,
                    " and for one before it, expected each slot once");
    taken[slot] = true;
  }
}

struct Copy {
  const Tensor& tokens;
  const Tensor& cache;
  char* to;

  Copy(const Tensor& from, const Tensor& into)
      : tokens(from), cache(into), to(static_cast<char*>(into.mutable_data_ptr())) {}

  void operator()(int64_t token, int64_t slot) const {
    const int64_t size = cache.element_size(), block_size = cache.size(1);
    const int64_t row = cache.size(3) * size;
    const char* from = static_cast<const char*>(tokens.const_data_ptr()) +
                       token * tokens.stride(0) * size;
    char* at = to + (slot / block_size * cache.stride(0) + slot % block_size * cache.stride(1)) * size;
    if (cache.stride(2) == cache.size(3)) {
      std::memcpy(at, from, row * cache.size(2));
      return;
    }
    for (int64_t head = 0; head < cache.size(2); ++head) {
      std::memcpy(at + head * cache.stride(2) * size, from + head * row, row);
    }
  }
};

// Numbers of `tokens` divided by their head's scale, as 8-bit floats.
template <typename T, typename To, typename Convert>
void convert_token(const Copy& copy, const Scales& scales, int64_t token, int64_t slot,
                   const Convert& convert) {
  const Tensor& cache = copy.cache;
  const int64_t block_size = cache.size(1), dim = cache.size(3);
  const T* from = static_cast<const T*>(copy.tokens.const_data_ptr()) +
                  token * copy.tokens.stride(0);
  To* to = reinterpret_cast<To*>(copy.to) + slot / block_size * cache.stride(0) +
           slot % block_size * cache.stride(1);
  for (int64_t head = 0; head < cache.size(2); ++head) {
    const float scale = scales.of(head);
    To* at = to + head * cache.stride(2);
    for (int64_t i = 0; i < dim; ++i) at[i] = convert(to_float(from[head * dim + i]) / scale);
  }
}

// One token into a cache of its own dtype or, converted, into one of 8-bit floats.
void write_token(const Copy& copy, const Scales& scales, int64_t token, int64_t slot) {
  if (!is_fp8(copy.cache)) return copy(token, slot);
  with_float(copy.tokens.scalar_type(), [&](auto as) {
    using T = decltype(as);
    if (copy.cache.scalar_type() == ScalarType::Float8_e4m3fn) {
      convert_token<T, e4m3>(copy, scales, token, slot, to_e4m3);
    } else {
      convert_token<T, e5m2>(copy, scales, token, slot, to_e5m2);
    }
  });
}

void write_kv_cache(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor slots,
                    std::optional<Tensor> k_scale, std::optional<Tensor> v_scale) {
  check_float(kOp, "k", k);
  check_dtype(kOp, "v", v, k.scalar_type());
  check_tokens("k", k, "k_cache", k_cache);
  check_tokens("v", v, "v_cache", v_cache);
  check_caches(k_cache, v_cache);
  for (const auto& [name, tokens] : {std::pair("k", &k), std::pair("v", &v)}) {
    check_not_within(name, *tokens, "k_cache", k_cache);
    check_not_within(name, *tokens, "v_cache", v_cache);
  }
  check_plain(kOp, "slots", slots);
  check_dtype(kOp, "slots", slots, ScalarType::Long);
  const int64_t tokens = k.size(0);
  STD_TORCH_CHECK(v.size(0) == tokens, kOp, ": v: got ", v.size(0), " tokens, expected k's ",
                  tokens);
  STD_TORCH_CHECK(slots.dim() == 1 && slots.size(0) == tokens, kOp, ": slots: got shape ",
                  shape_text(slots), ", expected [", tokens, "]");
  check_not_within("slots", slots, "k_cache", k_cache);
  check_not_within("slots", slots, "v_cache", v_cache);
  const Scales scale_k = check_scale(kOp, "k_scale", k_scale, k_cache);
  const Scales scale_v = check_scale(kOp, "v_scale", v_scale, v_cache);
  for (const auto& [name, scale] : {std::pair("k_scale", &k_scale), std::pair("v_scale", &v_scale)}) {
    if (!*scale) continue;
    check_not_within(name, **scale, "k_cache", k_cache);
    check_not_within(name, **scale, "v_cache", v_cache);
  }
  const auto* slot = static_cast<const int64_t*>(slots.const_data_ptr());
  check_slots(slot, tokens, k_cache.size(0) * k_cache.size(1));
  if (k.numel() == 0) return;
  const Copy copy_k(k, k_cache), copy_v(v, v_cache);
  const int64_t bytes = k_cache.size(2) * k_cache.size(3) * k_cache.element_size() * 2;
  parallel(tokens, kGrainBytes / bytes + 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slot[token] < 0) continue;
      write_token(copy_k, scale_k, token, slot[token]);
      write_token(copy_v, scale_v, token, slot[token]);
    }
  });
}

DS_OP(write_kv_cache_, write_kv_cache);

}  // namespace
}  // namespace ds
