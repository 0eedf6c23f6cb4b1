// Vectors of 8-bit floats. Included only by `*.kernel.cpp` files, as common/simd.h.
#pragma once

#include "attention/fp8.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {

// Each is the upper bits of an fp16 number, but for the exponent's offset and e4m3's NaN.

template <typename T>
DS_INLINE H load_bytes(const T* from) {
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, H);
}

DS_INLINE F from_fp16_bits(H bits) {
  fp16 lanes[kWidth];
  memcpy(lanes, &bits, sizeof bits);
  return load(lanes);
}

DS_INLINE F load(const e5m2* from) { return from_fp16_bits(load_bytes(from) << 8); }

DS_INLINE F load(const e4m3* from) {
  const H bits = load_bytes(from);
  const F v = from_fp16_bits((bits & 0x7f) << 7 | (bits & 0x80) << 8) * 256.0f;
  const F nan = splat(__builtin_nanf(""));
  // 480 is what the NaN would be, were it a number.
  return v * v == splat(480.0f * 480.0f) ? nan : v;
}

}  // namespace DS_ISA
}  // namespace ds
