// Matrix products by torch, from within a kernel's threads.
#pragma once

#include <vector>

#include "common/op.h"

namespace ds {

// The dtype that products of `dtype` are best computed in: itself, or fp32 where the processor has
// no instructions for it. What torch does with halves then is several times slower.
inline ScalarType product_dtype(ScalarType dtype) {
#if defined(__x86_64__)
  static const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
#else
  constexpr bool has_bf16 = false;
#endif
  return dtype == ScalarType::BFloat16 && has_bf16 ? dtype : ScalarType::Float;
}

// A tensor on the memory of `t`, which must outlive it. Threads of a kernel know nothing of the modes
// that its caller is in: there torch would record what is done to tensors that require gradients,
// and refuse to write to those of inference mode. Made in the thread that uses it, this is neither.
inline Tensor bare(const Tensor& t) {
  std::vector<int64_t> sizes, strides;
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    sizes.push_back(t.size(dim));
    strides.push_back(t.stride(dim));
  }
  return torch::stable::from_blob(const_cast<void*>(t.const_data_ptr()), sizes, strides, t.device(),
                                  t.scalar_type());
}

// out = a b, all of one dtype; out may be a view.
inline void multiply_into(const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  STD_TORCH_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION) == 0,
                  "aten::mm failed in a kernel of ds-ops");
  torch::stable::detail::to<Tensor>(stack[0]);  // a reference of its own, dropped here
}

}  // namespace ds
