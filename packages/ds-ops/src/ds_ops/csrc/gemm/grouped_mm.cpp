#include "gemm/grouped_mm.h"

#include <cstring>
#include <vector>

#include "gemm/products.h"

namespace ds {
namespace {

constexpr const char* kOp = "grouped_mm";
// Up to so many rows, an expert's matrix is worth reading only once, as it is: torch repacks it.
constexpr int64_t kFewRows = 8;
// Multiplications in one task: about a millisecond, which hides what torch does around them.
constexpr int64_t task_size(ScalarType work) {
  return work == ScalarType::BFloat16 ? 1 << 28 : 1 << 26;
}

// One expert's rows by some columns of its matrix (of the gradient: some rows of it).
struct Task {
  int64_t expert, begin, end, first, last;
};

std::vector<int64_t> ends(const Tensor& offsets, int64_t experts, int64_t rows) {
  check_plain(kOp, "offsets", offsets);
  check_dtype(kOp, "offsets", offsets, ScalarType::Int);
  STD_TORCH_CHECK(offsets.dim() == 1 && offsets.numel() == experts && experts >= 1, kOp,
                  ": offsets: got shape ", shape_text(offsets), ", expected [", experts,
                  "] of 1 or more experts");
  const auto* values = static_cast<const int32_t*>(offsets.const_data_ptr());
  std::vector<int64_t> found(values, values + experts);
  int64_t before = 0;
  for (int64_t end : found) {
    STD_TORCH_CHECK(before <= end, kOp, ": offsets: got ", end, " behind ", before,
                    ", expected offsets that never fall, from 0 on");
    before = end;
  }
  STD_TORCH_CHECK(before <= rows, kOp, ": offsets: got ", before, ", expected none beyond the ",
                  rows, " rows");
  return found;
}

// Splits [0, size) of every expert with rows; one row and one of `size` take `cost`
// multiplications.
std::vector<Task> tasks(const std::vector<int64_t>& ends, int64_t size, int64_t cost,
                        ScalarType work) {
  std::vector<Task> found;
  int64_t begin = 0;
  for (size_t expert = 0; expert < ends.size(); begin = ends[expert++]) {
    const int64_t rows = ends[expert] - begin;
    if (rows == 0) continue;
    // Multiples of 64, so that parts of 16-bit numbers begin at lines of the cache.
    const int64_t tile = (task_size(work) / (rows * cost + 1) / 64 + 1) * 64;
    for (int64_t first = 0; first < size; first += tile) {
      const int64_t last = first + tile < size ? first + tile : size;
      found.push_back({static_cast<int64_t>(expert), begin, ends[expert], first, last});
    }
  }
  return found;
}

Tensor rows_of(const Tensor& t, const Task& task, ScalarType dtype) {
  Tensor whole = t;
  Tensor part = torch::stable::narrow(whole, 0, task.begin, task.end - task.begin);
  return torch::stable::to(part, dtype);
}

// `place` = a b, computed in `work`.
void multiply_to(const Tensor& a, const Tensor& b, Tensor place, ScalarType work) {
  if (work == place.scalar_type() && place.is_contiguous()) return multiply_into(a, b, place);
  Tensor part = torch::stable::new_empty(place, {place.size(0), place.size(1)}, work);
  multiply_into(a, b, part);
  torch::stable::copy_(place, part);
}

void few(const Tensor& a, const Tensor& b, Tensor& out, const Task& task) {
  const int64_t depth = a.size(1), width = out.size(1), bytes = a.element_size();
  std::vector<float> rows(kRowsAtOnce * depth);
  const auto kernel = DS_BEST(multiply_few_rows);
  const char* matrix = static_cast<const char*>(b.const_data_ptr());
  for (int64_t row = task.begin; row < task.end; row += kRowsAtOnce) {
    const int64_t left = task.end - row;
    const int64_t count = left < kRowsAtOnce ? left : kRowsAtOnce;
    with_float(a.scalar_type(), [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(a.const_data_ptr()) + row * depth;
      for (int64_t i = 0; i < count * depth; ++i) rows[i] = to_float(from[i]);
    });
    std::fill(rows.begin() + count * depth, rows.end(), 0.0f);
    kernel({rows.data(), matrix + task.expert * b.stride(0) * bytes,
            static_cast<char*>(out.mutable_data_ptr()) + row * width * bytes, count, depth, width,
            b.stride(1), b.stride(2), float_type(a)},
           task.first, task.last);
  }
}

void many(const Tensor& a, const Tensor& b, Tensor& out, const Task& task, ScalarType work) {
  const int64_t count = task.last - task.first;
  Tensor matrix = torch::stable::select(b, 0, task.expert);
  matrix = torch::stable::to(torch::stable::narrow(matrix, 1, task.first, count), work);
  Tensor place = torch::stable::narrow(out, 0, task.begin, task.end - task.begin);
  place = torch::stable::narrow(place, 1, task.first, count);
  multiply_to(rows_of(a, task, work), matrix, place, work);
}

Tensor grouped_mm(Tensor a, Tensor b, Tensor offsets) {
  check_float(kOp, "a", a);
  check_plain(kOp, "a", a);
  STD_TORCH_CHECK(b.is_cpu(), kOp, ": b: not on a CPU, where this kernel runs");
  check_dtype(kOp, "b", b, a.scalar_type());
  STD_TORCH_CHECK(a.dim() == 2, kOp, ": a: got shape ", shape_text(a), ", expected [tokens, k]");
  STD_TORCH_CHECK(b.dim() == 3 && b.size(0) >= 1 && b.size(1) == a.size(1), kOp,
                  ": b: got shape ", shape_text(b), ", expected [experts, ", a.size(1), ", n]");
  const std::vector<int64_t> stops = ends(offsets, b.size(0), a.size(0));
  const int64_t depth = a.size(1), width = b.size(2);
  Tensor out = torch::stable::new_empty(a, {a.size(0), width});
  if (out.numel() == 0) return out;
  if (depth == 0) return torch::stable::zero_(out);
  // The rows behind the last expert's are nobody's.
  const int64_t row_bytes = width * a.element_size();
  std::memset(static_cast<char*>(out.mutable_data_ptr()) + stops.back() * row_bytes, 0,
              (a.size(0) - stops.back()) * row_bytes);
  if (b.stride(1) != 1 && b.stride(2) != 1) b = torch::stable::contiguous(b);
  const ScalarType work = product_dtype(a.scalar_type());
  const std::vector<Task> found = tasks(stops, width, depth, work);
  parallel(static_cast<int64_t>(found.size()), 1, [&](int64_t begin, int64_t end) {
    const Tensor left = bare(a), right = bare(b);
    Tensor to = bare(out);
    for (int64_t index = begin; index < end; ++index) {
      const Task& task = found[index];
      if (task.end - task.begin <= kFewRows) {
        few(left, right, to, task);
      } else {
        many(left, right, to, task, work);
      }
    }
  });
  return out;
}

// The gradient of b: a_e^T grad_e, by parts of its rows.
Tensor grouped_mm_backward(Tensor a, Tensor grad, Tensor offsets) {
  check_float(kOp, "a", a);
  check_plain(kOp, "a", a);
  check_plain(kOp, "grad", grad);
  check_dtype(kOp, "grad", grad, a.scalar_type());
  STD_TORCH_CHECK(a.dim() == 2 && grad.dim() == 2 && grad.size(0) == a.size(0), kOp,
                  ": grad: got shape ", shape_text(grad), ", expected [tokens, n] for a of ",
                  shape_text(a));
  const int64_t experts = offsets.numel();
  const std::vector<int64_t> stops = ends(offsets, experts, a.size(0));
  Tensor out = torch::stable::new_empty(a, {experts, a.size(1), grad.size(1)});
  if (out.numel() == 0) return out;
  const int64_t each = a.size(1) * grad.size(1) * a.element_size();
  int64_t begin_row = 0;
  for (int64_t expert = 0; expert < experts; begin_row = stops[expert++]) {
    if (stops[expert] == begin_row)
      std::memset(static_cast<char*>(out.mutable_data_ptr()) + expert * each, 0, each);
  }
  const ScalarType work = product_dtype(a.scalar_type());
  const std::vector<Task> found = tasks(stops, a.size(1), grad.size(1), work);
  parallel(static_cast<int64_t>(found.size()), 1, [&](int64_t begin, int64_t end) {
    const Tensor left = bare(a), right = bare(grad), to = bare(out);
    for (int64_t index = begin; index < end; ++index) {
      const Task& task = found[index];
      Tensor place = torch::stable::select(to, 0, task.expert);
      place = torch::stable::narrow(place, 0, task.first, task.last - task.first);
      Tensor turned = rows_of(left, task, work);
      turned = torch::stable::narrow(turned, 1, task.first, task.last - task.first);
      multiply_to(torch::stable::transpose(turned, 0, 1), rows_of(right, task, work), place,
                  work);
    }
  });
  return out;
}

DS_OP(grouped_mm, grouped_mm);
DS_OP(grouped_mm_backward, grouped_mm_backward);

}  // namespace
}  // namespace ds
