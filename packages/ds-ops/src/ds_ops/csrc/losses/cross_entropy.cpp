#include "losses/cross_entropy.h"

#include <vector>

#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "cross_entropy";
// Logits below which a part costs more to hand to a thread than to compute.
constexpr int64_t kGrain = 8192;

void check_targets(const int64_t* targets, int64_t rows, int64_t classes, int64_t ignored) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t target = targets[row];
    STD_TORCH_CHECK((target >= 0 && target < classes) || target == ignored, kOp, ": targets: got ",
                    target, " at index ", row, ", expected 0 to ", classes - 1,
                    " or ignore_index ", ignored);
  }
}

// The sum of losses times scale, added in order. A scale for all is applied to their sum: the mean of
// no row is 0 * infinity, a NaN.
Tensor sum_up(const Tensor& losses, const Tensor& scale) {
  const auto* values = static_cast<const float*>(losses.const_data_ptr());
  const auto* factors = static_cast<const float*>(scale.const_data_ptr());
  const bool per_row = scale.numel() != 1;
  double sum = 0.0;
  for (int64_t row = 0; row < losses.numel(); ++row) {
    sum += per_row ? static_cast<double>(values[row]) * factors[row] : values[row];
  }
  if (!per_row) sum *= factors[0];
  Tensor total = torch::stable::new_empty(losses, {}, ScalarType::Float);
  *static_cast<float*>(total.mutable_data_ptr()) = static_cast<float>(sum);
  return total;
}

// The total; the losses, [rows], fp32; the gradient into `gradient` unless that is null.
std::tuple<Tensor, Tensor> compute(const Tensor& logits, Tensor targets, const Tensor& scale,
                                   void* gradient, int64_t ignored, double smoothing,
                                   double z_loss, double softcap) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  check_plain(kOp, "targets", targets);
  if (targets.scalar_type() == ScalarType::Int) {
    targets = torch::stable::to(targets, ScalarType::Long);
  }
  check_dtype(kOp, "targets", targets, ScalarType::Long);
  check_numel(kOp, "targets", targets, rows);
  check_plain(kOp, "scale", scale);
  check_dtype(kOp, "scale", scale, ScalarType::Float);
  if (scale.numel() != 1) check_numel(kOp, "scale", scale, rows);
  STD_TORCH_CHECK(smoothing >= 0 && smoothing <= 1, kOp, ": label_smoothing: got ", smoothing,
                  ", expected 0 to 1");
  STD_TORCH_CHECK(z_loss >= 0, kOp, ": z_loss: got ", z_loss, ", expected 0 or more");
  STD_TORCH_CHECK(softcap >= 0, kOp, ": softcap: got ", softcap, ", expected 0 or more");
  const auto* wanted = static_cast<const int64_t*>(targets.const_data_ptr());
  check_targets(wanted, rows, classes, ignored);
  Tensor losses = torch::stable::new_empty(logits, {rows}, ScalarType::Float);
  const CrossEntropy call{logits.const_data_ptr(),
                          wanted,
                          static_cast<const float*>(scale.const_data_ptr()),
                          static_cast<float*>(losses.mutable_data_ptr()),
                          gradient,
                          classes,
                          ignored,
                          static_cast<float>(smoothing),
                          static_cast<float>(z_loss),
                          static_cast<float>(softcap),
                          scale.numel() != 1,
                          float_type(logits)};
  const auto kernel = DS_BEST(cross_entropy_rows);
  parallel(rows, kGrain / (classes + 1) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(cross_entropy_scratch(classes));
    kernel(call, scratch.data(), begin, end);
  });
  return {sum_up(losses, scale), losses};
}

void check_logits(const Tensor& logits) {
  check_float(kOp, "logits", logits);
  check_plain(kOp, "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2, kOp, ": logits: got shape ", shape_text(logits),
                  ", expected [tokens, classes]");
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(Tensor logits, Tensor targets, Tensor scale,
                                         int64_t ignored, double smoothing, double z_loss,
                                         double softcap, bool with_gradient) {
  check_logits(logits);
  Tensor gradient = with_gradient ? result_like(logits)
                                  : torch::stable::new_empty(logits, {0});
  void* to = with_gradient ? gradient.mutable_data_ptr() : nullptr;
  auto [total, losses] =
      compute(logits, targets, scale, to, ignored, smoothing, z_loss, softcap);
  return {total, losses, gradient};
}

std::tuple<Tensor, Tensor> cross_entropy_(Tensor logits, Tensor targets, Tensor scale,
                                          int64_t ignored, double smoothing, double z_loss,
                                          double softcap) {
  check_logits(logits);
  check_apart(kOp, "logits", logits, "targets", targets);
  check_apart(kOp, "logits", logits, "scale", scale);
  void* to = logits.mutable_data_ptr();
  return compute(logits, targets, scale, to, ignored, smoothing, z_loss, softcap);
}

DS_OP(cross_entropy, cross_entropy);
DS_OP(cross_entropy_, cross_entropy_);

}  // namespace
}  // namespace ds
