#include "moe/moe_permute.h"

#include <sys/mman.h>

#include <cstring>
#include <vector>

#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kPermute = "moe_permute";
constexpr const char* kUnpermute = "moe_unpermute";
// Rows of fewer bytes in all than this cost more to hand to a thread than to copy.
constexpr int64_t kGrainBytes = 65536;

// Asks for large pages below a result that is about to be written for the first time: the system
// hands out and clears 512 small ones each by itself, which takes longer than the copy into them.
void prefer_large_pages(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t end = (begin + t.numel() * t.element_size()) / kPage * kPage;
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  // A hint: where it is refused, nothing changes.
  if (first < end) (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

int64_t grain(int64_t row_bytes) { return kGrainBytes / (row_bytes + 1) + 1; }

// Where each slot of each token goes: first the ones that find room, then their places in order.
// Returns the token of each row.
std::vector<int32_t> place(const int32_t* indices, int64_t tokens, int64_t k, int64_t experts,
                           int64_t capacity, int32_t* offsets, int32_t* row_map) {
  std::vector<int32_t> used(static_cast<size_t>(experts), 0);
  // All first choices before all second ones, so that these do not take the room of those.
  for (int64_t slot = 0; slot < k; ++slot) {
    for (int64_t token = 0; token < tokens; ++token) {
      const int32_t expert = indices[token * k + slot];
      const bool fits = expert >= 0 && used[expert] < capacity;
      row_map[token * k + slot] = fits ? 0 : -1;
      if (fits) used[expert] += 1;
    }
  }
  std::vector<int32_t> next(static_cast<size_t>(experts));
  offsets[0] = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    next[expert] = offsets[expert];
    offsets[expert + 1] = offsets[expert] + used[expert];
  }
  std::vector<int32_t> source(static_cast<size_t>(offsets[experts]));
  for (int64_t i = 0; i < tokens * k; ++i) {
    if (row_map[i] < 0) continue;
    row_map[i] = next[indices[i]]++;
    source[row_map[i]] = static_cast<int32_t>(i / k);
  }
  return source;
}

std::tuple<Tensor, Tensor, Tensor> moe_permute(Tensor x, Tensor indices, int64_t num_experts,
                                               std::optional<int64_t> capacity) {
  check_float(kPermute, "x", x);
  check_plain(kPermute, "x", x);
  check_plain(kPermute, "indices", indices);
  check_dtype(kPermute, "indices", indices, ScalarType::Int);
  STD_TORCH_CHECK(x.dim() == 2, kPermute, ": x: got shape ", shape_text(x),
                  ", expected [tokens, width]");
  const int64_t tokens = x.size(0), width = x.size(1);
  STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == tokens && indices.numel() < INT32_MAX,
                  kPermute, ": indices: got shape ", shape_text(indices), ", expected [", tokens,
                  ", k], in all less than 2^31");
  STD_TORCH_CHECK(num_experts >= 1 && num_experts < INT32_MAX, kPermute, ": num_experts: got ",
                  num_experts, ", expected 1 or more");
  STD_TORCH_CHECK(!capacity || *capacity >= 0, kPermute, ": capacity: got ", capacity.value_or(0),
                  ", expected 0 or more");
  const int64_t k = indices.size(1), count = indices.numel();
  const auto* expert = static_cast<const int32_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(expert[i] >= -1 && expert[i] < num_experts, kPermute, ": indices: got ",
                    expert[i], " for token ", i / k, ", expected 0 to ", num_experts - 1,
                    ", or -1 for no expert");
  }
  Tensor rows = new_result(x, {count, width});
  prefer_large_pages(rows);
  Tensor offsets = torch::stable::new_empty(indices, {num_experts + 1});
  Tensor row_map = torch::stable::empty_like(indices);
  const auto source = place(expert, tokens, k, num_experts, capacity.value_or(INT32_MAX),
                            static_cast<int32_t*>(offsets.mutable_data_ptr()),
                            static_cast<int32_t*>(row_map.mutable_data_ptr()));
  const int64_t bytes = width * x.element_size();
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t filled = static_cast<int64_t>(source.size());
  parallel(count, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row < filled) {
        std::memcpy(to + row * bytes, from + source[row] * bytes, bytes);
      } else {
        std::memset(to + row * bytes, 0, bytes);
      }
    }
  });
  return {rows, offsets, row_map};
}

// [tokens, k], each row -1 or one of `rows`.
void check_row_map(const Tensor& row_map, const std::optional<Tensor>& weights, int64_t rows) {
  check_plain(kUnpermute, "row_map", row_map);
  check_dtype(kUnpermute, "row_map", row_map, ScalarType::Int);
  STD_TORCH_CHECK(row_map.dim() == 2, kUnpermute, ": row_map: got shape ", shape_text(row_map),
                  ", expected [tokens, k]");
  const auto* row = static_cast<const int32_t*>(row_map.const_data_ptr());
  for (int64_t i = 0; i < row_map.numel(); ++i) {
    STD_TORCH_CHECK(row[i] >= -1 && row[i] < rows, kUnpermute, ": row_map: got ", row[i],
                    " for token ", i / row_map.size(1), ", expected -1 to ", rows - 1);
  }
  if (!weights) return;
  check_plain(kUnpermute, "weights", *weights);
  check_dtype(kUnpermute, "weights", *weights, ScalarType::Float);
  STD_TORCH_CHECK(weights->dim() == 2 && weights->size(0) == row_map.size(0) &&
                      weights->size(1) == row_map.size(1),
                  kUnpermute, ": weights: got shape ", shape_text(*weights), ", expected ",
                  shape_text(row_map));
}

void check_rows(const char* name, const Tensor& y) {
  check_float(kUnpermute, name, y);
  check_plain(kUnpermute, name, y);
  STD_TORCH_CHECK(y.dim() == 2, kUnpermute, ": ", name, ": got shape ", shape_text(y),
                  ", expected [rows, width]");
}

const float* floats_of(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}

Tensor moe_unpermute(Tensor y, Tensor row_map, std::optional<Tensor> weights) {
  check_rows("y", y);
  check_row_map(row_map, weights, y.size(0));
  const int64_t tokens = row_map.size(0), k = row_map.size(1), width = y.size(1);
  Tensor out = new_result(y, {tokens, width});
  const MoeUnpermute call{y.const_data_ptr(),
                          static_cast<const int32_t*>(row_map.const_data_ptr()),
                          floats_of(weights),
                          out.mutable_data_ptr(),
                          k,
                          width,
                          float_type(y)};
  const auto kernel = DS_BEST(moe_unpermute_rows);
  parallel(tokens, grain(width * y.element_size() * (k + 1)),
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return out;
}

// Rows that no token has, which get no gradient. A row that two have is an error: two threads might
// write it.
std::vector<bool> rows_taken(const Tensor& row_map, int64_t rows) {
  std::vector<bool> taken(static_cast<size_t>(rows), false);
  const auto* row = static_cast<const int32_t*>(row_map.const_data_ptr());
  for (int64_t i = 0; i < row_map.numel(); ++i) {
    if (row[i] < 0) continue;
    STD_TORCH_CHECK(!taken[row[i]], kUnpermute, ": row_map: got row ", row[i],
                    " twice, which has no gradient; expected each row at most once");
    taken[row[i]] = true;
  }
  return taken;
}

std::tuple<Tensor, Tensor> moe_unpermute_backward(Tensor grad, std::optional<Tensor> y,
                                                  Tensor row_map, std::optional<Tensor> weights,
                                                  int64_t rows) {
  check_rows("grad", grad);
  STD_TORCH_CHECK(rows >= 0, kUnpermute, ": rows: got ", rows, ", expected 0 or more");
  check_row_map(row_map, weights, rows);
  const int64_t tokens = row_map.size(0), k = row_map.size(1), width = grad.size(1);
  STD_TORCH_CHECK(grad.size(0) == tokens, kUnpermute, ": grad: got shape ", shape_text(grad),
                  ", expected [", tokens, ", width]");
  STD_TORCH_CHECK(y || !weights, kUnpermute, ": y: got None, expected a tensor beside weights");
  if (weights) {
    check_rows("y", *y);
    check_dtype(kUnpermute, "y", *y, grad.scalar_type());
    STD_TORCH_CHECK(y->size(0) == rows && y->size(1) == width, kUnpermute, ": y: got shape ",
                    shape_text(*y), ", expected [", rows, ", ", width, "]");
  }
  const auto taken = rows_taken(row_map, rows);
  Tensor dy = new_result(grad, {rows, width});
  prefer_large_pages(dy);
  Tensor dweights =
      torch::stable::new_empty(grad, {weights ? tokens : 0, k}, ScalarType::Float);
  const MoeUnpermuteBackward call{grad.const_data_ptr(),
                                  weights ? y->const_data_ptr() : nullptr,
                                  static_cast<const int32_t*>(row_map.const_data_ptr()),
                                  floats_of(weights),
                                  dy.mutable_data_ptr(),
                                  static_cast<float*>(dweights.mutable_data_ptr()),
                                  k,
                                  width,
                                  float_type(grad)};
  const int64_t bytes = width * grad.element_size();
  for (int64_t row = 0; row < rows; ++row) {
    if (!taken[row]) std::memset(static_cast<char*>(call.dy) + row * bytes, 0, bytes);
  }
  const auto kernel = DS_BEST(moe_unpermute_backward_rows);
  parallel(tokens, grain(bytes * (k + 1)),
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {dy, dweights};
}

DS_OP(moe_permute, moe_permute);
DS_OP(moe_unpermute, moe_unpermute);
DS_OP(moe_unpermute_backward, moe_unpermute_backward);

}  // namespace
}  // namespace ds
