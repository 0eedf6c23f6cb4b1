// One pass, bound by the memory that y takes: a byte of signs becomes 16 to 32 bytes. A thread writes
// 16 bytes at once, past the caches; the byte it reads is the same for neighbours, and comes from L1.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "sign_unpack.h"

namespace ds {
namespace {

constexpr int kThreads = 256;

__device__ float converted(float v, float) { return v; }
__device__ __nv_bfloat16 converted(float v, __nv_bfloat16) { return __float2bfloat16_rn(v); }
__device__ __half converted(float v, __half) { return __float2half_rn(v); }

// Index: 32 bits where they suffice, for the division.
template <typename T, typename Index>
__global__ void __launch_bounds__(kThreads)
    sign_unpack(const uint8_t* __restrict__ codes, const float* __restrict__ scales,
                T* __restrict__ y, Index numel, Index chunk) {
  constexpr int kEach = 16 / sizeof(T);
  const Index at = (static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x) * kEach;
  if (at >= numel) return;
  const unsigned signs = codes[at / 8] >> (at % 8);
  // kEach divides 8, and 8 divides a chunk (or there is one): all of a thread's have one scale.
  const float scale = scales[at / chunk];
  const T above = converted(scale, T{}), below = converted(-scale, T{});
  alignas(16) T found[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) found[i] = (signs >> i) & 1 ? above : below;
  if (numel - at >= kEach) {
    __stcs(reinterpret_cast<uint4*>(y + at), *reinterpret_cast<const uint4*>(found));
    return;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {  // unrolled, so that `found` stays in registers
    if (at + i < numel) y[at + i] = found[i];
  }
}

template <typename T>
int launch(const SignUnpackCall& call, cudaStream_t stream) {
  constexpr int64_t kEach = 16 / sizeof(T) * kThreads;
  const int64_t blocks = (call.numel + kEach - 1) / kEach;
  T* y = static_cast<T*>(call.y);
  // The last thread's position, behind the end, has to fit too.
  if (blocks * kEach <= UINT32_MAX) {
    sign_unpack<T, uint32_t><<<blocks, kThreads, 0, stream>>>(
        call.codes, call.scales, y, static_cast<uint32_t>(call.numel),
        static_cast<uint32_t>(call.chunk));
  } else {
    sign_unpack<T, uint64_t><<<blocks, kThreads, 0, stream>>>(call.codes, call.scales, y,
                                                             call.numel, call.chunk);
  }
  return cudaGetLastError();
}

}  // namespace

int launch_sign_unpack(const SignUnpackCall& call, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (call.y_type) {
    case FloatType::fp32:
      return launch<float>(call, on);
    case FloatType::bf16:
      return launch<__nv_bfloat16>(call, on);
    default:
      return launch<__half>(call, on);
  }
}

}  // namespace ds
