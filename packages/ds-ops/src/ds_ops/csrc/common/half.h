// The 16-bit floats, as types of our own, and their conversions one at a time.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ds {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

// static: each file has its own copy, compiled for its own instruction set (see simd.h).
static inline float to_float(float value) { return value; }

static inline float to_float(bf16 value) {
  const uint32_t wide = (uint32_t)value.bits << 16;
  float result;
  memcpy(&result, &wide, sizeof result);
  return result;
}

static inline float to_float(fp16 value) {
  const uint32_t sign = (uint32_t)(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  uint32_t wide;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    wide = sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13);
  } else if (magnitude >= 0x400u) {
    wide = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // a multiple of 2^-24
    const float small = (float)magnitude * 5.9604644775390625e-8f;
    memcpy(&wide, &small, sizeof wide);
    wide |= sign;
  }
  float result;
  memcpy(&result, &wide, sizeof result);
  return result;
}

static inline bf16 to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return bf16{(uint16_t)((bits >> 16) | 0x40u)};
  return bf16{(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

static inline fp16 to_fp16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return fp16{(uint16_t)(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return fp16{(uint16_t)(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves 2^-24 as the last bit
    float shifted;
    memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;
    uint32_t raw;
    memcpy(&raw, &shifted, sizeof raw);
    return fp16{(uint16_t)(sign | (raw - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return fp16{(uint16_t)(sign | ((rounded - 0x38000000u) >> 13))};
}

}  // namespace ds
