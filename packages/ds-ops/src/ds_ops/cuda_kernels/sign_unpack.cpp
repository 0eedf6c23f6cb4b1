#include "sign_unpack.h"

#include <torch/csrc/stable/accelerator.h>

#include "launch.h"

namespace ds {
namespace {

constexpr const char* kName = "sign_unpack";

Tensor sign_unpack(Tensor codes, Tensor scales, int64_t numel, ScalarType dtype) {
  check_on_gpu(kName, "codes", codes, codes);
  check_on_gpu(kName, "scales", scales, codes);
  check_dtype(kName, "codes", codes, ScalarType::Byte);
  check_dtype(kName, "scales", scales, ScalarType::Float);
  STD_TORCH_CHECK(numel >= 0 && codes.dim() == 1 && codes.numel() == numel / 8 + (numel % 8 != 0),
                  kName, ": codes: got shape ", shape_text(codes), ", expected [",
                  numel / 8 + (numel % 8 != 0), "] for ", numel, " numbers");
  const int64_t count = scales.numel();
  const bool fits = count != 0 ? numel % count == 0 : numel == 0;
  STD_TORCH_CHECK(scales.dim() == 1 && fits, kName, ": scales: got shape ", shape_text(scales),
                  ", expected one per chunk of ", numel, " numbers in all");
  const int64_t chunk = count != 0 ? numel / count : 0;
  STD_TORCH_CHECK(count <= 1 || chunk % 8 == 0, kName, ": scales: got ", count, " for ", numel,
                  " numbers, expected chunks of a multiple of 8");
  const bool is_float =
      dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(is_float, kName, ": dtype: got ", dtype_name(dtype),
                  ", expected torch.float32, torch.bfloat16 or torch.float16");
  const torch::stable::accelerator::DeviceGuard guard(codes.get_device_index());
  Tensor y = torch::stable::new_empty(codes, {numel}, dtype);
  if (numel == 0) return y;
  const SignUnpackCall call{
      static_cast<const uint8_t*>(codes.const_data_ptr()),
      static_cast<const float*>(scales.const_data_ptr()),
      y.mutable_data_ptr(),
      float_type(y),
      numel,
      chunk,
  };
  check_launch(kName, launch_sign_unpack(call, current_stream(kName, codes.get_device_index())));
  return y;
}

DS_OP(sign_unpack, sign_unpack);

}  // namespace
}  // namespace ds
