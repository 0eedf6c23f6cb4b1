#include "layers/gated_activation.h"

#include <string>
#include <vector>

#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "gated_activation";
constexpr const char* kPacked = "gated_activation_packed";
// Elements below which a part costs more to hand to a thread than to compute.
constexpr int64_t kGrain = 8192;
// Parts begin where a cache line of any element type does.
constexpr int64_t kAlign = 64;

Activation activation_of(const char* op, const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", op, ": activation: got '", name,
                  "', expected 'silu', 'gelu' or 'gelu_tanh'");
  return Activation::gelu_tanh;
}

void check_same(const char* argument, const Tensor& t, const Tensor& gate) {
  check_plain(kOp, argument, t);
  check_dtype(kOp, argument, t, gate.scalar_type());
  check_numel(kOp, argument, t, gate.numel());
}

const char* at(const Tensor& t, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) + element * t.element_size();
}

char* at_mutable(const Tensor& t, int64_t element) {
  return static_cast<char*>(t.mutable_data_ptr()) + element * t.element_size();
}

Tensor gated_activation(Tensor gate, Tensor up, std::string activation) {
  check_float(kOp, "gate", gate);
  check_plain(kOp, "gate", gate);
  check_same("up", up, gate);
  const Activation act = activation_of(kOp, activation);
  Tensor y = result_like(gate);
  const auto kernel = DS_BEST(gated_activation_span);
  parallel(
      gate.numel(), kGrain,
      [&](int64_t begin, int64_t end) {
        const GatedForward span{at(gate, begin), at(up, begin), at_mutable(y, begin)};
        kernel(span, end - begin, act, float_type(gate));
      },
      kAlign);
  return y;
}

std::tuple<Tensor, Tensor> gated_activation_backward(Tensor grad, Tensor gate, Tensor up,
                                                     std::string activation) {
  check_float(kOp, "gate", gate);
  check_plain(kOp, "gate", gate);
  check_same("up", up, gate);
  check_same("grad", grad, gate);
  const Activation act = activation_of(kOp, activation);
  Tensor dgate = result_like(gate);
  Tensor dup = result_like(gate);
  const auto kernel = DS_BEST(gated_activation_backward_span);
  parallel(
      gate.numel(), kGrain,
      [&](int64_t begin, int64_t end) {
        const GatedBackward span{at(grad, begin), at(gate, begin), at(up, begin),
                                 at_mutable(dgate, begin), at_mutable(dup, begin)};
        kernel(span, end - begin, act, float_type(gate));
      },
      kAlign);
  return {dgate, dup};
}

// Half the last dimension of x [..., 2 * half].
int64_t check_packed(const Tensor& x) {
  check_float(kPacked, "x", x);
  check_plain(kPacked, "x", x);
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) % 2 == 0, kPacked, ": x: got shape ",
                  shape_text(x), ", expected an even last dimension: gates, then ups");
  return x.size(x.dim() - 1) / 2;
}

Tensor gated_activation_packed(Tensor x, std::string activation) {
  const int64_t half = check_packed(x);
  const Activation act = activation_of(kPacked, activation);
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) shape.push_back(x.size(dim));
  shape.push_back(half);
  Tensor y = new_result(x, shape);
  const auto kernel = DS_BEST(gated_activation_span);
  parallel(half ? y.numel() / half : 0, kGrain / (half + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const GatedForward span{at(x, 2 * row * half), at(x, (2 * row + 1) * half),
                              at_mutable(y, row * half)};
      kernel(span, half, act, float_type(x));
    }
  });
  return y;
}

Tensor gated_activation_packed_backward(Tensor grad, Tensor x, std::string activation) {
  const int64_t half = check_packed(x);
  const Activation act = activation_of(kPacked, activation);
  check_plain(kPacked, "grad", grad);
  check_dtype(kPacked, "grad", grad, x.scalar_type());
  check_numel(kPacked, "grad", grad, x.numel() / 2);
  Tensor dx = result_like(x);
  const auto kernel = DS_BEST(gated_activation_backward_span);
  const int64_t rows = half ? grad.numel() / half : 0;
  parallel(rows, kGrain / (half + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t gate = 2 * row * half;
      const GatedBackward span{at(grad, row * half), at(x, gate), at(x, gate + half),
                               at_mutable(dx, gate), at_mutable(dx, gate + half)};
      kernel(span, half, act, float_type(x));
    }
  });
  return dx;
}

DS_OP(gated_activation, gated_activation);
DS_OP(gated_activation_backward, gated_activation_backward);
DS_OP(gated_activation_packed, gated_activation_packed);
DS_OP(gated_activation_packed_backward, gated_activation_packed_backward);

}  // namespace
}  // namespace ds
