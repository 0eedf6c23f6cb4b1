// The 8-bit floats that caches may hold (OCP e4m3 and e5m2), and their conversions one at a time.
#pragma once

#include <stdint.h>
#include <string.h>

namespace ds {

struct e4m3 {
  uint8_t bits;
};

struct e5m2 {
  uint8_t bits;
};

// The bits of the nearest number with so many bits of mantissa and that bias, the even one of two;
// beyond `largest` that one. A NaN becomes 0x7f, which is one in both formats.
template <int mantissa, int bias>
static inline uint8_t to_fp8(float value, float largest) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint8_t sign = (uint8_t)(bits >> 24 & 0x80u);
  if (value != value) return sign | 0x7f;
  bits &= 0x7fffffffu;
  float size;
  memcpy(&size, &bits, sizeof size);
  if (size > largest) size = largest;
  memcpy(&bits, &size, sizeof bits);
  constexpr int dropped = 23 - mantissa;
  constexpr uint32_t smallest_normal = (uint32_t)(128 - bias) << 23;
  if (bits < smallest_normal) {
    // The sum's last bit is worth the smallest number there is: the addition rounds.
    constexpr uint32_t anchor_bits = (uint32_t)(127 + 1 - bias - mantissa + 23) << 23;
    float anchor;
    memcpy(&anchor, &anchor_bits, sizeof anchor);
    const float sum = size + anchor;
    memcpy(&bits, &sum, sizeof bits);
    return sign | (uint8_t)(bits - anchor_bits);
  }
  bits += (1u << (dropped - 1)) - 1u + (bits >> dropped & 1u);
  return sign | (uint8_t)((bits >> dropped) - ((127u - bias) << mantissa));
}

static inline e4m3 to_e4m3(float value) { return e4m3{to_fp8<3, 7>(value, 448.0f)}; }
static inline e5m2 to_e5m2(float value) { return e5m2{to_fp8<2, 15>(value, 57344.0f)}; }

}  // namespace ds
