#include "norms/layer_norm.h"

#include "norms/norm.h"

namespace ds {
namespace {

constexpr const char* kOp = "layer_norm";

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight,
                                                      std::optional<Tensor> bias, double eps,
                                                      std::optional<Tensor> residual) {
  const int64_t width = check_rows(kOp, x, weight);
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps: got ", eps, ", expected 0 or more");
  if (bias) check_like(kOp, "bias", *bias, weight);
  if (residual) check_like(kOp, "residual", *residual, x);
  Tensor y = result_like(x);
  Tensor mean = new_per_row(x);
  Tensor scale = new_per_row(x);
  Tensor sum = residual ? result_like(x) : torch::stable::new_empty(x, {0});
  const Tensor weight32 = in_fp32(weight);
  const Tensor bias32 = bias ? in_fp32(*bias) : weight32;
  const LayerNormForward call{x.const_data_ptr(),
                              floats(weight32),
                              bias ? floats(bias32) : nullptr,
                              residual ? residual->const_data_ptr() : nullptr,
                              y.mutable_data_ptr(),
                              residual ? sum.mutable_data_ptr() : nullptr,
                              static_cast<float*>(mean.mutable_data_ptr()),
                              static_cast<float*>(scale.mutable_data_ptr()),
                              width,
                              static_cast<float>(eps),
                              float_type(x)};
  const auto kernel = DS_BEST(layer_norm_rows);
  parallel(scale.numel(), kNormGrain / (width + 1) + 1,
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {y, mean, scale, sum};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor grad, Tensor x, Tensor weight,
                                                       Tensor mean, Tensor scale,
                                                       std::optional<Tensor> grad_sum) {
  const int64_t width = check_rows(kOp, x, weight);
  const int64_t rows = width ? x.numel() / width : 0;
  check_like(kOp, "grad", grad, x);
  check_per_row(kOp, "mean", mean, width ? rows : mean.numel());
  check_per_row(kOp, "scale", scale, width ? rows : scale.numel());
  if (grad_sum) check_like(kOp, "grad_sum", *grad_sum, x);
  Tensor dx = result_like(x);
  const Tensor weight32 = in_fp32(weight);
  const LayerNormBackward call{grad.const_data_ptr(),
                               x.const_data_ptr(),
                               floats(weight32),
                               floats(mean),
                               floats(scale),
                               grad_sum ? grad_sum->const_data_ptr() : nullptr,
                               dx.mutable_data_ptr(),
                               width,
                               float_type(x)};
  const auto kernel = DS_BEST(layer_norm_backward_rows);
  const auto sum = [&](float* sums, int64_t begin, int64_t end) { kernel(call, sums, begin, end); };
  Tensor both = sum_over_rows(x, rows, 2 * width, sum);
  // Tensors of their own, not views of one: whoever takes them may write into them.
  Tensor halves[2];
  for (int64_t i = 0; i < 2; ++i) {
    Tensor half = torch::stable::narrow(both, 0, i * width, width);
    halves[i] = weight.scalar_type() == ScalarType::Float
                    ? torch::stable::clone(half)
                    : torch::stable::to(half, weight.scalar_type());
  }
  return {dx, halves[0], halves[1]};
}

DS_OP(layer_norm, layer_norm);
DS_OP(layer_norm_backward, layer_norm_backward);

}  // namespace
}  // namespace ds
