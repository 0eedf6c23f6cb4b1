#include "launch.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

namespace ds {
namespace {

using GetStream = int32_t (*)(int32_t device, void** stream);

GetStream find_get_stream() {
  // Loaded already, or there would be no tensor on a GPU; never loaded by us.
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return nullptr;
  return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

}  // namespace

void* current_stream(const char* op, int32_t device) {
  static const GetStream get = find_get_stream();
  STD_TORCH_CHECK(get != nullptr, op,
                  ": libtorch_cuda.so is not loaded or has no aoti_torch_get_current_cuda_stream; "
                  "torch has to be built with CUDA, version 2.11 or newer");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, op, ": torch has no current stream on GPU ", device);
  return stream;
}

void check_on_gpu(const char* op, const char* argument, const Tensor& t, const Tensor& first) {
  STD_TORCH_CHECK(t.is_cuda(), op, ": ", argument, ": not on a GPU, where this kernel runs");
  STD_TORCH_CHECK(t.get_device_index() == first.get_device_index(), op, ": ", argument,
                  ": on GPU ", t.get_device_index(), ", expected ", first.get_device_index(),
                  ", where the others are");
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", argument, ": not contiguous (shape ", shape_text(t),
                  "); call .contiguous() on it");
}

void check_launch(const char* op, int code) {
  STD_TORCH_CHECK(code == cudaSuccess, op, ": the kernel was not launched: ",
                  cudaGetErrorString(static_cast<cudaError_t>(code)));
}

}  // namespace ds
