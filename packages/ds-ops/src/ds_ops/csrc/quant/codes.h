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

// --- Codes in memory: one to a byte, or to two --------------------------------------------------

// By intrinsics: compilers make single moves of a conversion of vectors to or from bytes.

DS_INLINE I load_codes(const uint8_t* from) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__x86_64__)
  int32_t bytes;
  memcpy(&bytes, from, sizeof bytes);
  const __m128i none = _mm_setzero_si128();
  return (I)_mm_unpacklo_epi16(_mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), none), none);
#else
  I codes;
  for (int lane = 0; lane < kWidth; ++lane) codes[lane] = from[lane];
  return codes;
#endif
}

DS_INLINE I load_codes(const uint16_t* from) {
  H codes;
  memcpy(&codes, from, sizeof codes);
  return __builtin_convertvector(codes, I);
}

DS_INLINE void store_codes(uint8_t* to, I codes) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)codes));
#elif defined(__AVX2__)
  const __m256i order = _mm256_set1_epi32(0x0c080400);
  const __m256i fours = _mm256_shuffle_epi8((__m256i)codes, order);
  const __m128i high = _mm256_extracti128_si256(fours, 1);
  _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), high));
#elif defined(__x86_64__)
  const __m128i pairs = _mm_packs_epi32((__m128i)codes, (__m128i)codes);
  const int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
  memcpy(to, &bytes, sizeof bytes);
#else
  for (int lane = 0; lane < kWidth; ++lane) to[lane] = (uint8_t)codes[lane];
#endif
}

DS_INLINE void store_codes(uint16_t* to, I codes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)codes));
#elif defined(__AVX2__)
  const __m128i high = _mm256_extracti128_si256((__m256i)codes, 1);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)codes), high));
#else
  for (int lane = 0; lane < kWidth; ++lane) to[lane] = (uint16_t)codes[lane];
#endif
}

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
// n is rounded to an integer. The code is n behind the exponent E: n's leading one, if there is
// one, adds 1 to it, and so does rounding up to the next power of two.
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
