// One vector of numbers to codes and back. Every step rounds as the reference's does, on every
// instruction set: products are not fused with the additions behind them (`unfused`).
//
// Included by kernel files only.
#pragma once

#include "common/simd.h"
#include "quant/quantize.h"

namespace ds {
namespace DS_ISA {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

// v as it is, rounded to fp32: the compiler may not make one operation of it and what follows.
DS_INLINE F unfused(F v) {
#if defined(__aarch64__)
  __asm__("" : "+w"(v));
#elif defined(__AVX512F__)
  __asm__("" : "+v"(v));
#else
  __asm__("" : "+x"(v));
#endif
  return v;
}

DS_INLINE I max_int(I a, I b) { return a > b ? a : b; }
DS_INLINE I min_int(I a, I b) { return a < b ? a : b; }

// --- Random bits --------------------------------------------------------------------------------

// Of (seed, block, place in the block) alone, so that threads and vector widths do not matter.
struct Key {
  uint32_t low;
  uint32_t high;
};

// The step of SplitMix64 (Steele, Lea and Flood 2014), with the block as its counter.
DS_INLINE Key key_of(uint64_t seed, int64_t block) {
  uint64_t z = seed + ((uint64_t)block + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return Key{(uint32_t)z, (uint32_t)(z >> 32)};
}

// A mixing function of 32 bits (two rounds of xor-shift and multiply) over Weyl-spaced places.
DS_INLINE U random_bits(U place, Key key) {
  U h = place * 0x9e3779b9u + key.low;
  h = (h ^ (h >> 16)) * 0x21f0aaadu;
  h ^= key.high;
  h = (h ^ (h >> 15)) * 0x735a2d97u;
  return h ^ (h >> 15);
}

// --- Rounding -----------------------------------------------------------------------------------

DS_INLINE F floor_of(F v) {  // of |v| < 2^22
  const F cut = __builtin_convertvector(__builtin_convertvector(v, I), F);
  return cut > v ? cut - 1.0f : cut;
}

// Up with the probability of the fraction, whose upper 24 bits count.
DS_INLINE F round_random(F v, U bits) {
  const F low = floor_of(v);
  const F chance = __builtin_convertvector((I)(bits >> 8), F) * 0x1p-24f;
  return chance < v - low ? low + 1.0f : low;
}

template <bool kStochastic>
DS_INLINE F rounded(F v, U place, Key key) {
  if constexpr (kStochastic) return round_random(v, random_bits(place, key));
  return round_even(v);
}

// --- Codes --------------------------------------------------------------------------------------

template <bool kStochastic>
DS_INLINE I integer_codes(F v, const BlockFormat& format, U place, Key key) {
  const I number = __builtin_convertvector(rounded<kStochastic>(v, place, key), I);
  const I kept = max_int(min_int(number, splat_int(format.highest)), splat_int(format.lowest));
  return kept & ((1 << format.bits) - 1);
}

// With E = max(exponent of v, that of the smallest normal number), |v| = n * 2^(E - mantissa) where
// n is rounded to an integer. The code is n behind the exponent E: n's leading one, if there is one,
// adds 1 to it, and so does rounding up to the next power of two.
template <bool kStochastic>
DS_INLINE I float_codes(F v, const BlockFormat& format, U place, Key key) {
  const I magnitude = (I)((U)v & 0x7fffffffu);
  const I exponent = max_int((magnitude >> 23) - 127, splat_int(format.min_exponent));
  const F step = (F)((format.mantissa + 127 - exponent) << 23);
  const I n = __builtin_convertvector(rounded<kStochastic>((F)magnitude * step, place, key), I);
  const I code = ((exponent - format.min_exponent) << format.mantissa) + n;
  const I sign = (I)((U)v >> 31) << (format.bits - 1);
  return min_int(code, splat_int(format.largest_code)) | sign;
}

DS_INLINE F integers_of(I codes, const BlockFormat& format) {
  const int sign = format.symmetric ? 1 << (format.bits - 1) : 0;
  return __builtin_convertvector((codes ^ sign) - sign, F);
}

DS_INLINE F floats_of(I codes, const BlockFormat& format) {
  const I magnitude = codes & ((1 << (format.bits - 1)) - 1);
  const I sign = (codes >> (format.bits - 1)) << 31;
  const I exponent = magnitude >> format.mantissa;
  const I leading = exponent > 0 ? splat_int(1 << format.mantissa) : I{};
  const I n = (magnitude & ((1 << format.mantissa) - 1)) | leading;
  const I step = max_int(exponent, splat_int(1)) + (format.min_exponent - 1 - format.mantissa);
  const F value = __builtin_convertvector(n, F) * (F)((step + 127) << 23);
  // Infinity and NaN: all ones in the exponent, in fp32 as well.
  const I special = 0x7f800000 | ((magnitude << (23 - format.mantissa)) & 0x7fffff);
  return (F)((magnitude >= format.special_code ? special : (I)value) | sign);
}

}  // namespace
}  // namespace DS_ISA
}  // namespace ds
