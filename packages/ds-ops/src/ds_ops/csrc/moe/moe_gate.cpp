#include "moe/moe_gate.h"

#include <cmath>
#include <string>
#include <vector>

#include "common/op.h"

namespace ds {
namespace {

constexpr const char* kOp = "moe_gate";
// Tokens of fewer experts in all than this cost more to hand to a thread than to compute.
constexpr int64_t kGrain = 4096;

void check_logits(const Tensor& logits, int64_t k) {
  check_float(kOp, "logits", logits);
  check_plain(kOp, "logits", logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && logits.size(1) <= INT32_MAX, kOp,
                  ": logits: got shape ", shape_text(logits), ", expected [tokens, experts]");
  STD_TORCH_CHECK(k >= 1 && k <= logits.size(1), kOp, ": k: got ", k, ", expected 1 to ",
                  logits.size(1));
}

void check_groups(int64_t experts, int64_t k, int64_t groups, int64_t top_groups) {
  STD_TORCH_CHECK(groups >= 1 && experts % groups == 0, kOp, ": groups: got ", groups,
                  ", expected a divisor of ", experts, " experts");
  STD_TORCH_CHECK(top_groups >= 1 && top_groups <= groups && top_groups * (experts / groups) >= k,
                  kOp, ": top_groups: got ", top_groups, ", expected at most ", groups,
                  ", with k = ", k, " experts or more in them");
}

bool is_sigmoid(const std::string& scoring) {
  STD_TORCH_CHECK(scoring == "softmax" || scoring == "sigmoid", kOp, ": scoring: got '", scoring,
                  "', expected 'softmax' or 'sigmoid'");
  return scoring == "sigmoid";
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_gate(Tensor logits, int64_t k, bool normalize,
                                                    std::string scoring,
                                                    std::optional<Tensor> bias, int64_t groups,
                                                    int64_t top_groups, double scale) {
  check_logits(logits, k);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_groups(experts, k, groups, top_groups);
  STD_TORCH_CHECK(std::isfinite(scale), kOp, ": scale: got ", scale, ", expected a finite number");
  if (bias) {
    check_plain(kOp, "bias", *bias);
    check_dtype(kOp, "bias", *bias, ScalarType::Float);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == experts, kOp, ": bias: got shape ",
                    shape_text(*bias), ", expected [", experts, "]");
  }
  Tensor weights = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Float);
  Tensor indices = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Int);
  Tensor counts = torch::stable::new_empty(logits, {experts}, ScalarType::Int);
  Tensor probabilities = torch::stable::new_empty(logits, {tokens, experts}, ScalarType::Float);
  const MoeGate call{logits.const_data_ptr(),
                     bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr,
                     static_cast<float*>(weights.mutable_data_ptr()),
                     static_cast<int32_t*>(indices.mutable_data_ptr()),
                     static_cast<float*>(probabilities.mutable_data_ptr()),
                     experts,
                     k,
                     groups,
                     top_groups,
                     static_cast<float>(scale),
                     normalize,
                     is_sigmoid(scoring),
                     float_type(logits)};
  const auto kernel = DS_BEST(moe_gate_rows);
  const int64_t grain = kGrain / experts + 1;
  const int64_t parts = (tokens + grain - 1) / grain;
  // Each thread counts for itself; whole numbers add up to the same in any order.
  std::vector<std::vector<int32_t>> found(static_cast<size_t>(parts));
  parallel(parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(gate_scratch(experts, groups)));
    std::vector<int32_t> own(static_cast<size_t>(experts), 0);
    const int64_t stop = end * grain < tokens ? end * grain : tokens;
    kernel(call, begin * grain, stop, own.data(), scratch.data());
    found[begin] = std::move(own);
  });
  int32_t* total = static_cast<int32_t*>(counts.mutable_data_ptr());
  for (int64_t i = 0; i < experts; ++i) total[i] = 0;
  for (const auto& own : found) {
    for (size_t i = 0; i < own.size(); ++i) total[i] += own[i];
  }
  return {weights, indices, counts, probabilities};
}

const float* optional_floats(const char* name, const std::optional<Tensor>& t, int64_t numel) {
  if (!t) return nullptr;
  check_plain(kOp, name, *t);
  check_dtype(kOp, name, *t, ScalarType::Float);
  check_numel(kOp, name, *t, numel);
  return static_cast<const float*>(t->const_data_ptr());
}

Tensor moe_gate_backward(std::optional<Tensor> grad_weights,
                         std::optional<Tensor> grad_probabilities, Tensor logits,
                         Tensor probabilities, Tensor indices, bool normalize, std::string scoring,
                         double scale) {
  check_plain(kOp, "indices", indices);
  check_dtype(kOp, "indices", indices, ScalarType::Int);
  STD_TORCH_CHECK(indices.dim() == 2, kOp, ": indices: got shape ", shape_text(indices),
                  ", expected [tokens, k]");
  const int64_t k = indices.size(1);
  check_logits(logits, k);
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  check_numel(kOp, "indices", indices, tokens * k);
  check_plain(kOp, "probabilities", probabilities);
  check_dtype(kOp, "probabilities", probabilities, ScalarType::Float);
  check_numel(kOp, "probabilities", probabilities, tokens * experts);
  const auto* chosen = static_cast<const int32_t*>(indices.const_data_ptr());
  for (int64_t i = 0; i < tokens * k; ++i) {
    STD_TORCH_CHECK(chosen[i] >= 0 && chosen[i] < experts, kOp, ": indices: got ", chosen[i],
                    ", expected 0 to ", experts - 1);
  }
  Tensor grad = torch::stable::empty_like(logits);
  const MoeGateBackward call{
      optional_floats("grad_weights", grad_weights, tokens * k),
      optional_floats("grad_probabilities", grad_probabilities, tokens * experts),
      static_cast<const float*>(probabilities.const_data_ptr()),
      chosen,
      grad.mutable_data_ptr(),
      experts,
      k,
      static_cast<float>(scale),
      normalize,
      is_sigmoid(scoring),
      float_type(logits)};
  const auto kernel = DS_BEST(moe_gate_backward_rows);
  parallel(tokens, kGrain / experts + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(gate_scratch(experts, 1)));
    kernel(call, begin, end, scratch.data());
  });
  return grad;
}

DS_OP(moe_gate, moe_gate);
DS_OP(moe_gate_backward, moe_gate_backward);

}  // namespace
}  // namespace ds
