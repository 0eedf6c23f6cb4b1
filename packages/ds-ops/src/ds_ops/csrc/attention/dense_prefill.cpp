#include "attention/dense_prefill.h"

#include <array>
#include <cstring>

namespace ds {
namespace {

// Queries behind a history need a mask, [queries, keys]: so many of them at a time.
constexpr int64_t kMaskedQueries = 512;

// [1, kv_heads, length, dim], as torch's attention takes it.
Tensor gather(const Tensor& cache, const DensePrefill& call) {
  const int64_t block_size = cache.size(1), heads = cache.size(2), dim = cache.size(3);
  const int64_t size = cache.element_size(), row = dim * size;
  Tensor dense = torch::stable::new_empty(cache, {call.length, heads, dim});
  const char* from = static_cast<const char*>(cache.const_data_ptr());
  char* to = static_cast<char*>(dense.mutable_data_ptr());
  const bool together = cache.stride(2) == dim;
  parallel(call.length, 64, [&](int64_t begin, int64_t end) {
    for (int64_t key = begin; key < end; ++key) {
      const char* token = from + (call.blocks[key / block_size] * cache.stride(0) +
                                  key % block_size * cache.stride(1)) * size;
      char* at = to + key * heads * row;
      if (together) {
        std::memcpy(at, token, heads * row);
        continue;
      }
      for (int64_t head = 0; head < heads; ++head) {
        std::memcpy(at + head * row, token + head * cache.stride(2) * size, row);
      }
    }
  });
  return torch::stable::unsqueeze(torch::stable::transpose(dense, 0, 1), 0);
}

// Query i, at position `first` + i, sees keys up to its own.
Tensor causal_mask(const Tensor& like, int64_t queries, int64_t keys, int64_t first) {
  Tensor mask = torch::stable::new_empty(like, {queries, keys}, ScalarType::Bool);
  char* to = static_cast<char*>(mask.mutable_data_ptr());
  for (int64_t i = 0; i < queries; ++i) {
    std::memset(to + i * keys, 1, first + i + 1);
    std::memset(to + i * keys + first + i + 1, 0, keys - first - i - 1);
  }
  return mask;
}

Tensor torch_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                       const std::optional<Tensor>& mask, double scale) {
  using torch::stable::detail::from;
  const bool shared = q.size(1) != k.size(1);
  std::array<StableIValue, 8> stack{from(q),
                                    from(k),
                                    from(v),
                                    from(mask),
                                    from(0.0),
                                    from(!mask.has_value()),
                                    from(std::optional<double>(scale)),
                                    from(shared)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::scaled_dot_product_attention", "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor detach(const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Rows [start, start + count) of [tokens, heads, dim] as [1, heads, count, dim].
Tensor rows_of(Tensor t, int64_t start, int64_t count) {
  return torch::stable::unsqueeze(
      torch::stable::transpose(torch::stable::narrow(t, 0, start, count), 0, 1), 0);
}

}  // namespace

bool dense_prefill_is_faster(const Tensor& q) {
#if defined(__x86_64__)
  static const bool has = [] {
    __builtin_cpu_init();
    return isa() == Isa::avx512 && __builtin_cpu_supports("amx-bf16");
  }();
  return has && q.scalar_type() == ScalarType::BFloat16;
#else
  (void)q;
  return false;
#endif
}

void dense_prefill(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                   const DensePrefill& call, Tensor& out) {
  const Tensor own = detach(q);
  Tensor k = gather(k_cache, call), v = gather(v_cache, call);
  const int64_t history = call.length - call.queries;
  const int64_t step = history ? kMaskedQueries : call.queries;
  for (int64_t done = 0; done < call.queries; done += step) {
    const int64_t count = call.queries - done < step ? call.queries - done : step;
    const int64_t keys = history + done + count, start = call.query_start + done;
    std::optional<Tensor> mask;
    if (history) mask = causal_mask(own, count, keys, history + done);
    const Tensor found =
        torch_attention(rows_of(own, start, count), torch::stable::narrow(k, 2, 0, keys),
                        torch::stable::narrow(v, 2, 0, keys), mask, call.scale);
    Tensor to = rows_of(out, start, count);
    torch::stable::copy_(to, found);
  }
}

}  // namespace ds
