// Where the random bits of stochastic rounding come from: a function of (seed, element) alone.
//
// The bits of element `i` do not depend on threads, vector widths or the order of elements:
//
//   keys:   s = seed + (i >> 32) * 0x9e3779b97f4a7c15, put through splitmix64's finalizer;
//           k0 = low 32 bits, k1 = high 32 bits            (all of it modulo 2^64)
//   x = (uint32) i * 0x9e3779b9 + k0                       (from here modulo 2^32)
//   x = (x ^ (x >> 16)) * 0x7feb352d
//   x = (x ^ (x >> 15) ^ k1) * 0x846ca68b
//   bits = x ^ (x >> 16)
//
// The two multipliers and shifts are those of Wellons' "lowbias32"; the finalizer is Steele,
// Lea and Flood 2014, "Fast splittable pseudorandom number generators".
//
// bf16 from fp32: add 16 random bits below the last bit kept, then cut: the value above is taken
// with a probability equal to the distance from the value below, so the expectation is exact.
//   parameter: bits & 0xffff, first state: bits >> 16, second state: (bits * 0x9e3779b1) >> 16
#pragma once

#include <stdint.h>

namespace ds {

struct RoundingKeys {
  uint32_t k0;
  uint32_t k1;
};

static inline RoundingKeys rounding_keys(uint64_t seed, int64_t element) {
  uint64_t s = seed + (uint64_t)(element >> 32) * 0x9e3779b97f4a7c15u;
  s = (s ^ (s >> 30)) * 0xbf58476d1ce4e5b9u;
  s = (s ^ (s >> 27)) * 0x94d049bb133111ebu;
  s ^= s >> 31;
  return {(uint32_t)s, (uint32_t)(s >> 32)};
}

}  // namespace ds
