#include "norms/rms_norm.h"

#include "norms/norm.h"

namespace ds {
namespace {

constexpr const char* kOp = "rms_norm";

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps,
                                            std::optional<Tensor> residual) {
  const int64_t width = check_rows(kOp, x, weight);
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps: got ", eps, ", expected 0 or more");
  if (residual) check_like(kOp, "residual", *residual, x);
  Tensor y = result_like(x);
  Tensor scale = new_per_row(x);
  Tensor sum = residual ? result_like(x) : torch::stable::new_empty(x, {0});
  const Tensor weight32 = in_fp32(weight);
  const RmsNormForward call{x.const_data_ptr(),
                            floats(weight32),
                            residual ? residual->const_data_ptr() : nullptr,
                            y.mutable_data_ptr(),
                            residual ? sum.mutable_data_ptr() : nullptr,
                            static_cast<float*>(scale.mutable_data_ptr()),
                            width,
                            static_cast<float>(eps),
                            float_type(x)};
  const auto kernel = DS_BEST(rms_norm_rows);
  parallel(scale.numel(), kNormGrain / (width + 1) + 1,
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {y, scale, sum};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale,
                                             std::optional<Tensor> grad_sum) {
  const int64_t width = check_rows(kOp, x, weight);
  const int64_t rows = width ? x.numel() / width : 0;
  check_like(kOp, "grad", grad, x);
  check_per_row(kOp, "scale", scale, width ? rows : scale.numel());
  if (grad_sum) check_like(kOp, "grad_sum", *grad_sum, x);
  Tensor dx = result_like(x);
  const Tensor weight32 = in_fp32(weight);
  const RmsNormBackward call{grad.const_data_ptr(),
                             x.const_data_ptr(),
                             floats(weight32),
                             floats(scale),
                             grad_sum ? grad_sum->const_data_ptr() : nullptr,
                             dx.mutable_data_ptr(),
                             width,
                             float_type(x)};
  const auto kernel = DS_BEST(rms_norm_backward_rows);
  Tensor dweight = sum_over_rows(x, rows, width, [&](float* sums, int64_t begin, int64_t end) {
    kernel(call, sums, begin, end);
  });
  if (weight.scalar_type() == ScalarType::Float) return {dx, dweight};
  return {dx, torch::stable::to(dweight, weight.scalar_type())};
}

DS_OP(rms_norm, rms_norm);
DS_OP(rms_norm_backward, rms_norm_backward);

}  // namespace
}  // namespace ds
