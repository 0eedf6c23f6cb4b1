#include "norms/rms_norm.h"

#include <vector>

#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "rms_norm";
// Parts of fewer elements than this cost more to hand to a thread than to compute.
constexpr int64_t kGrain = 16384;

FloatType float_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return FloatType::fp32;
    case ScalarType::BFloat16:
      return FloatType::bf16;
    default:
      return FloatType::fp16;
  }
}

int64_t check(const Tensor& x, const Tensor& weight) {
  check_float(kOp, "x", x);
  check_plain(kOp, "x", x);
  check_plain(kOp, "weight", weight);
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() ||
                      weight.scalar_type() == ScalarType::Float,
                  kOp, ": weight: got ", dtype_name(weight.scalar_type()), ", expected ",
                  dtype_name(x.scalar_type()), " or torch.float32");
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1 && weight.size(0) == x.size(x.dim() - 1), kOp,
                  ": weight: got shape ", shape_text(weight), ", expected [",
                  x.dim() ? x.size(x.dim() - 1) : 0, "] for x of shape ", shape_text(x));
  return weight.size(0);
}

std::vector<int64_t> lead_of(const Tensor& x) {
  std::vector<int64_t> lead;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) lead.push_back(x.size(dim));
  return lead;
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t width = check(x, weight);
  STD_TORCH_CHECK(eps >= 0, kOp, ": eps: got ", eps, ", expected 0 or more");
  Tensor y = torch::stable::empty_like(x);
  Tensor scale = torch::stable::new_empty(x, lead_of(x), ScalarType::Float);
  const int64_t rows = width ? x.numel() / width : 0;
  const RmsNormForward call{x.const_data_ptr(),
                            weight.const_data_ptr(),
                            y.mutable_data_ptr(),
                            static_cast<float*>(scale.mutable_data_ptr()),
                            width,
                            static_cast<float>(eps),
                            float_type(x),
                            float_type(weight)};
  const auto kernel = DS_BEST(rms_norm_rows);
  parallel(rows, kGrain / (width + 1) + 1,
           [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {y, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor scale) {
  const int64_t width = check(x, weight);
  check_plain(kOp, "grad", grad);
  check_plain(kOp, "scale", scale);
  check_dtype(kOp, "grad", grad, x.scalar_type());
  check_dtype(kOp, "scale", scale, ScalarType::Float);
  const int64_t rows = width ? x.numel() / width : 0;
  check_numel(kOp, "grad", grad, x.numel());
  check_numel(kOp, "scale", scale, rows);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dweight = torch::stable::new_empty(weight, {width}, ScalarType::Float);
  float* total = static_cast<float*>(dweight.mutable_data_ptr());
  for (int64_t i = 0; i < width; ++i) total[i] = 0.0f;
  const RmsNormBackward call{grad.const_data_ptr(),
                             x.const_data_ptr(),
                             weight.const_data_ptr(),
                             static_cast<const float*>(scale.const_data_ptr()),
                             dx.mutable_data_ptr(),
                             width,
                             float_type(x),
                             float_type(weight)};
  const auto kernel = DS_BEST(rms_norm_backward_rows);
  // Fixed parts, each with a sum of its own, added in order: the result is the same bit for bit
  // with any number of threads.
  constexpr int64_t kPart = 64;
  const int64_t parts = (rows + kPart - 1) / kPart;
  std::vector<float> sums(static_cast<size_t>(parts) * width, 0.0f);
  parallel(parts, kGrain / (kPart * width + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t stop = (part + 1) * kPart;
      kernel(call, sums.data() + part * width, part * kPart, stop < rows ? stop : rows);
    }
  });
  for (int64_t part = 0; part < parts; ++part) {
    for (int64_t i = 0; i < width; ++i) total[i] += sums[part * width + i];
  }
  if (weight.scalar_type() == ScalarType::Float) return {dx, dweight};
  return {dx, torch::stable::to(dweight, weight.scalar_type())};
}

DS_OP(rms_norm, rms_norm);
DS_OP(rms_norm_backward, rms_norm_backward);

}  // namespace
}  // namespace ds
