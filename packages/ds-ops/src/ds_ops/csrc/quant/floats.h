// Numbers of any of the float types to fp32 and back. Included by kernel files only.
//
// Buffers of fp32 have room for a whole vector behind their end.
#pragma once

#include "common/simd.h"
#include "quant/quantize.h"

namespace ds {
namespace DS_ISA {
namespace {

template <typename T>
void widen(const T* from, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store(to + i, load_some(from + i, count - i));
}

void load_floats(const void* from, FloatType type, int64_t at, float* to, int64_t count) {
  switch (type) {
    case FloatType::fp32:
      return widen(static_cast<const float*>(from) + at, to, count);
    case FloatType::bf16:
      return widen(static_cast<const bf16*>(from) + at, to, count);
    case FloatType::fp16:
      return widen(static_cast<const fp16*>(from) + at, to, count);
  }
}

template <typename T>
void narrow(const float* from, T* to, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load(from + i), count - i);
}

void store_floats(const float* from, void* to, FloatType type, int64_t at, int64_t count) {
  switch (type) {
    case FloatType::fp32:
      return narrow(from, static_cast<float*>(to) + at, count);
    case FloatType::bf16:
      return narrow(from, static_cast<bf16*>(to) + at, count);
    case FloatType::fp16:
      return narrow(from, static_cast<fp16*>(to) + at, count);
  }
}

}  // namespace
}  // namespace DS_ISA
}  // namespace ds
