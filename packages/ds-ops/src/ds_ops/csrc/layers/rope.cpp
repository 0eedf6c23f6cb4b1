#include "layers/rope.h"

#include <algorithm>
#include <utility>

#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "rope";
// Elements below which a part costs more to hand to a thread than to compute.
constexpr int64_t kGrain = 16384;

void check_x(const Tensor& x) {
  check_float(kOp, "x", x);
  STD_TORCH_CHECK(x.is_cpu(), kOp, ": x: not on a CPU, where this kernel runs");
  STD_TORCH_CHECK(x.dim() == 4, kOp, ": x: got shape ", shape_text(x),
                  ", expected 4 dimensions: batch, sequence and heads, width of a head");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) <= 1, kOp,
                  ": x: the elements of a head do not lie side by side; call .contiguous() on it");
}

// No two elements of x are the same memory, as of an expanded tensor: it is to be written.
void check_own_elements(const Tensor& x) {
  std::pair<int64_t, int64_t> dims[4];  // (stride, size)
  for (int64_t dim = 0; dim < 4; ++dim) dims[dim] = {x.stride(dim), x.size(dim)};
  std::sort(dims, dims + 4);
  int64_t reach = 0;
  for (const auto& [stride, size] : dims) {
    if (size == 1) continue;
    STD_TORCH_CHECK(stride > reach, kOp,
                    ": x: its elements overlap in memory and are to be written; call .clone()");
    reach += stride * (size - 1);
  }
}

Tensor check_table(const char* argument, const Tensor& table, const Tensor& x, int64_t positions) {
  check_plain(kOp, argument, table);
  check_float(kOp, argument, table);
  const int64_t dim = table.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && table.size(dim - 2) == positions &&
                      2 * table.size(dim - 1) <= x.size(3) &&
                      (dim == 2 || table.size(0) == x.size(0) || table.size(0) == 1),
                  kOp, ": ", argument, ": got shape ", shape_text(table), ", expected [", positions,
                  ", pairs] or [", x.size(0), ", ", positions, ", pairs] with 2 * pairs <= ",
                  x.size(3));
  if (table.scalar_type() == ScalarType::Float) return table;
  return torch::stable::to(table, ScalarType::Float);
}

void rotate(const Tensor& x, const Tensor& y, Tensor cos, Tensor sin, bool heads_first,
            bool interleaved, bool inverse) {
  const int sequence = heads_first ? 2 : 1;
  cos = check_table("cos", cos, x, x.size(sequence));
  sin = check_table("sin", sin, x, x.size(sequence));
  const int64_t pairs = cos.size(cos.dim() - 1);
  check_numel(kOp, "sin", sin, cos.numel());
  const bool batched = cos.dim() == 3 && cos.size(0) > 1;
  Rope call{x.const_data_ptr(),
            y.mutable_data_ptr(),
            static_cast<const float*>(cos.const_data_ptr()),
            static_cast<const float*>(sin.const_data_ptr()),
            {},
            {},
            {},
            {},
            x.size(3),
            pairs,
            interleaved,
            inverse,
            float_type(x)};
  for (int dim = 0; dim < 3; ++dim) {
    call.size[dim] = x.size(dim);
    call.x_stride[dim] = x.stride(dim);
    call.y_stride[dim] = y.stride(dim);
  }
  call.table_stride[0] = batched ? x.size(sequence) * pairs : 0;
  call.table_stride[sequence] = pairs;
  // The heads of a position lie side by side in memory more often than not: walk as x lies.
  if (call.x_stride[1] < call.x_stride[2]) {
    for (auto* each : {call.size, call.x_stride, call.y_stride, call.table_stride}) {
      std::swap(each[1], each[2]);
    }
  }
  const auto kernel = DS_BEST(rope_rows);
  parallel(call.size[0] * call.size[1] * call.size[2], kGrain / (x.size(3) + 1) + 1,
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

Tensor rope(Tensor x, Tensor cos, Tensor sin, bool heads_first, bool interleaved, bool inverse) {
  check_x(x);
  Tensor y = result_like(x);
  STD_TORCH_CHECK(y.stride(3) == 1 || y.size(3) <= 1, kOp,
                  ": x: its elements overlap in memory, so that the result would lie otherwise; "
                  "call .contiguous() on it");
  rotate(x, y, cos, sin, heads_first, interleaved, inverse);
  return y;
}

void rope_(Tensor x, Tensor cos, Tensor sin, bool heads_first, bool interleaved, bool inverse) {
  check_x(x);
  check_own_elements(x);
  check_apart(kOp, "x", x, "cos", cos);
  check_apart(kOp, "x", x, "sin", sin);
  rotate(x, x, cos, sin, heads_first, interleaved, inverse);
}

DS_OP(rope, rope);
DS_OP(rope_, rope_);

}  // namespace
}  // namespace ds
