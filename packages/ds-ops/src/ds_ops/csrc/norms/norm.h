// What the operators of the norms share: their checks, and the sum over rows for a weight.
#pragma once

#include <cstring>
#include <vector>

#include "common/op.h"
#include "norms/weight_gradient.h"

namespace ds {

// Parts of fewer elements than this cost more to hand to a thread than to compute.
constexpr int64_t kNormGrain = 16384;

// The width of x's rows, after checks of x and weight.
inline int64_t check_rows(const char* op, const Tensor& x, const Tensor& weight) {
  check_float(op, "x", x);
  check_plain(op, "x", x);
  check_plain(op, "weight", weight);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() ||
                      weight.scalar_type() == ScalarType::Float,
                  op, ": weight: got ", dtype_name(weight.scalar_type()), ", expected ",
                  dtype_name(x.scalar_type()), " or torch.float32");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), op,
                  ": weight: got shape ", shape_text(weight), ", expected [",
                  x.dim() ? x.size(x.dim() - 1) : 0, "] for x of shape ", shape_text(x));
  return weight.size(0);
}

// `t` is plain and has x's dtype and as many elements.
inline void check_like(const char* op, const char* argument, const Tensor& t, const Tensor& x) {
  check_plain(op, argument, t);
  check_dtype(op, argument, t, x.scalar_type());
  check_numel(op, argument, t, x.numel());
}

// `t` is plain, fp32 and has one element per row.
inline void check_per_row(const char* op, const char* argument, const Tensor& t, int64_t rows) {
  check_plain(op, argument, t);
  check_dtype(op, argument, t, ScalarType::Float);
  check_numel(op, argument, t, rows);
}

// What kernels read weights as: short beside x, they are converted once and not per row.
inline Tensor in_fp32(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

inline const float* floats(const Tensor& t) {
  return static_cast<const float*>(t.const_data_ptr());
}

// x's shape without the last dimension, fp32.
inline Tensor new_per_row(const Tensor& x) {
  std::vector<int64_t> lead;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) lead.push_back(x.size(dim));
  return torch::stable::new_empty(x, lead, ScalarType::Float);
}

// The sum over rows of what `body(sums, begin, end)` adds to `sums` [width] for rows [begin, end),
// as a tensor [width], fp32. Parts of rows do not depend on the number of threads.
template <typename Body>
Tensor sum_over_rows(const Tensor& like, int64_t rows, int64_t width, const Body& body) {
  constexpr int64_t kMostParts = 64;
  constexpr int64_t kFewestRows = 64;
  int64_t size = (rows + kMostParts - 1) / kMostParts;
  size = size < kFewestRows ? kFewestRows : (size + 3) / 4 * 4;
  const int64_t parts = (rows + size - 1) / size;
  Tensor total = torch::stable::new_empty(like, {width}, ScalarType::Float);
  float* found = static_cast<float*>(total.mutable_data_ptr());
  Tensor scratch = torch::stable::new_empty(like, {parts * width}, ScalarType::Float);
  float* sums = static_cast<float*>(scratch.mutable_data_ptr());
  parallel(parts, kNormGrain / (size * width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* own = sums + part * width;
      std::memset(own, 0, width * sizeof(float));
      const int64_t stop = (part + 1) * size;
      body(own, part * size, stop < rows ? stop : rows);
    }
  });
  const auto add_up = DS_BEST(add_up_parts);
  parallel(width, kNormGrain / (parts + 1) + 1, [&](int64_t begin, int64_t end) {
    add_up(sums, parts, width, found, begin, end);
  });
  return total;
}

}  // namespace ds
