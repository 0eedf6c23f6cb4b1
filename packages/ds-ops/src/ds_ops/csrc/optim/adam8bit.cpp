#include "optim/adam8bit.h"

#include "optim/operator.h"

namespace ds {
namespace {

constexpr const char* kOp = "adam8bit_step_";

void check_codes(StepTensors& tensors, const char* argument, const Tensor& codes) {
  check_dtype(kOp, argument, codes, ScalarType::Byte);
  tensors.shaped(argument, codes);
  tensors.other(argument, codes, true);
}

void check_scales(StepTensors& tensors, const char* argument, const Tensor& scales) {
  check_dtype(kOp, argument, scales, ScalarType::Float);
  check_plain(kOp, argument, scales);
  const int64_t blocks = (tensors.numel() + kCodeBlock - 1) / kCodeBlock;
  STD_TORCH_CHECK(scales.dim() == 1 && scales.numel() == blocks, kOp, ": ", argument,
                  ": got shape ", shape_text(scales), ", expected [", blocks, "], one per ",
                  kCodeBlock, " elements");
  tensors.other(argument, scales, true);
}

void adam8bit_step_(Tensor param, Tensor grad, Tensor exp_avg_codes, Tensor exp_avg_scales,
                    Tensor exp_avg_sq_codes, Tensor exp_avg_sq_scales, std::optional<Tensor> copy,
                    std::optional<Tensor> grad_scale, double lr, double beta1, double beta2,
                    double eps, double weight_decay, int64_t step, bool decoupled,
                    std::optional<int64_t> seed, std::optional<Tensor> found_inf) {
  StepTensors tensors(kOp, param);
  tensors.grad("grad", grad);
  check_codes(tensors, "exp_avg_codes", exp_avg_codes);
  check_scales(tensors, "exp_avg_scales", exp_avg_scales);
  check_codes(tensors, "exp_avg_sq_codes", exp_avg_sq_codes);
  check_scales(tensors, "exp_avg_sq_scales", exp_avg_sq_scales);
  tensors.copy("copy", copy);
  tensors.grad_scale(grad_scale);
  tensors.found_inf(found_inf);
  tensors.seed(seed);
  const AdamStep call = adam_step(kOp, lr, beta1, beta2, eps, weight_decay, step, decoupled,
                                  /*bias_correction=*/true);
  const CodedStates states{static_cast<uint8_t*>(exp_avg_codes.mutable_data_ptr()),
                           static_cast<float*>(exp_avg_scales.mutable_data_ptr()),
                           static_cast<uint8_t*>(exp_avg_sq_codes.mutable_data_ptr()),
                           static_cast<float*>(exp_avg_sq_scales.mutable_data_ptr())};
  const StepStreams& streams = tensors.checked();
  if (tensors.skips()) return;
  const auto kernel = DS_BEST(adam8bit_elements);
  parallel(
      tensors.numel(), kStepGrain,
      [&](int64_t begin, int64_t end) { kernel(streams, states, call, begin, end); }, kCodeBlock);
}

DS_OP(adam8bit_step_, adam8bit_step_);

}  // namespace
}  // namespace ds
