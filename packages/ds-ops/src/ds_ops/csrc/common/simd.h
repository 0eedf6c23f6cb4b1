// Vectors of floats for one instruction set, and the conversions that kernels need.
//
// Included only by `*.kernel.cpp` files. Each is compiled once per instruction set, with DS_ISA
// naming it (baseline, avx2, avx512, neon): everything here is in `namespace ds::DS_ISA`, so that no
// function compiled for a newer processor can be linked into the code for an older one. For the
// same reason a kernel file includes no header of the standard library with templates in it.
//
// `F` is a vector of `kWidth` floats and `I` of as many ints, as the compiler's own vector types:
// + - * / < == ?: and & work on them lane by lane, and a * b + c becomes one fused operation where
// the processor has it. They are loaded and stored through `load` and `store`, never by a cast.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/half.h"

#define DS_INLINE static inline __attribute__((always_inline))

namespace ds {
namespace DS_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float F __attribute__((vector_size(kWidth * 4)));
typedef int32_t I __attribute__((vector_size(kWidth * 4)));
typedef uint32_t U __attribute__((vector_size(kWidth * 4)));
typedef uint16_t H __attribute__((vector_size(kWidth * 2)));
typedef int8_t B __attribute__((vector_size(kWidth)));

DS_INLINE F splat(float value) { return value - F{}; }
DS_INLINE I splat_int(int32_t value) { return value - I{}; }

// --- Loads and stores: any alignment ------------------------------------------------------------

DS_INLINE F load(const float* from) {
  F v;
  memcpy(&v, from, sizeof v);
  return v;
}

DS_INLINE void store(float* to, F v) { memcpy(to, &v, sizeof v); }

DS_INLINE F from_bf16_bits(H bits) {
#if defined(__AVX512F__)
  // One instruction, where GCC 12 makes five of the conversion below.
  return (F)((U)_mm512_cvtepu16_epi32((__m256i)bits) << 16);
#else
  return (F)(__builtin_convertvector(bits, U) << 16);
#endif
}

// Bits whose high half is the nearest bf16, ties to even; a NaN stays one.
DS_INLINE U rounded_to_bf16(F v) {
  const U bits = (U)v;
  const U half = ((bits >> 16) & 1u) + 0x7fffu;
#if defined(__AVX512F__)
  // Where v is a NaN, the addition leaves this one in its place.
  const __m512i nan = _mm512_set1_epi32(0x7fc00000);
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  return (U)_mm512_mask_add_epi32(nan, number, (__m512i)bits, (__m512i)half);
#else
  return (U)(v == v) ? bits + half : bits | 0x400000u;
#endif
}

DS_INLINE H to_bf16_bits(F v) {
  const U high = rounded_to_bf16(v) >> 16;
#if defined(__AVX512F__)
  return (H)_mm512_cvtepi32_epi16((__m512i)high);
#else
  return __builtin_convertvector(high, H);
#endif
}

DS_INLINE F load(const bf16* from) {
  H bits;
  memcpy(&bits, from, sizeof bits);
  return from_bf16_bits(bits);
}

DS_INLINE void store(bf16* to, F v) {
  const H bits = to_bf16_bits(v);
  memcpy(to, &bits, sizeof bits);
}

#if defined(__x86_64__) && !defined(__AVX2__)
// Without instructions for it; called, for inlined everywhere they are most of what is compiled.
static __attribute__((noinline, unused)) F fp16_by_lane(const fp16* from) {
  F v;
  for (int lane = 0; lane < kWidth; ++lane) v[lane] = to_float(from[lane]);
  return v;
}

static __attribute__((noinline, unused)) void fp16_by_lane(fp16* to, F v) {
  for (int lane = 0; lane < kWidth; ++lane) to[lane] = to_fp16(v[lane]);
}
#endif

DS_INLINE F load(const fp16* from) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (F)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t*)from)));
#else
  return fp16_by_lane(from);
#endif
}

DS_INLINE void store(fp16* to, F v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16((uint16_t*)to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  fp16_by_lane(to, v);
#endif
}

// The last `count` < kWidth elements of a row: what lies behind is neither read nor written.
template <typename T>
DS_INLINE F load_some(const T* from, int count) {
  T padded[kWidth] = {};
  for (int lane = 0; lane < count; ++lane) padded[lane] = from[lane];
  return load(padded);
}

template <typename T>
DS_INLINE void store_some(T* to, F v, int count) {
  T padded[kWidth];
  store(padded, v);
  for (int lane = 0; lane < count; ++lane) to[lane] = padded[lane];
}

#if defined(__AVX512F__)
// The same by masks; lanes that a mask leaves out touch no memory.
DS_INLINE __mmask16 first_lanes(int count) { return (__mmask16)((1u << count) - 1u); }

DS_INLINE F load_some(const float* from, int count) {
  return (F)_mm512_maskz_loadu_ps(first_lanes(count), from);
}

DS_INLINE F load_some(const bf16* from, int count) {
  return from_bf16_bits((H)_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

DS_INLINE F load_some(const fp16* from, int count) {
  return (F)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), from));
}

DS_INLINE void store_some(float* to, F v, int count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v);
}

DS_INLINE void store_some(bf16* to, F v, int count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)to_bf16_bits(v));
}

DS_INLINE void store_some(fp16* to, F v, int count) {
  const __m256i bits = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_mask_storeu_epi16(to, first_lanes(count), bits);
}
#endif

// --- Arithmetic ---------------------------------------------------------------------------------

// The second, if one of them is a NaN.
DS_INLINE F maximum(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

DS_INLINE F minimum(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
DS_INLINE F absolute(F a) { return (F)((U)a & 0x7fffffffu); }

DS_INLINE F square_root(F v) {
#if defined(__AVX512F__)
  return (F)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (F)_mm256_sqrt_ps((__m256)v);
#elif defined(__x86_64__)
  return (F)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return (F)vsqrtq_f32((float32x4_t)v);
#else
  for (int lane = 0; lane < kWidth; ++lane) v[lane] = __builtin_sqrtf(v[lane]);
  return v;
#endif
}

// `v`, as the compiler cannot see: it would cancel an addition and a subtraction.
DS_INLINE F kept(F v) {
#if defined(__aarch64__)
  __asm__("" : "+w"(v));
#else
  __asm__("" : "+x"(v));
#endif
  return v;
}

// Nearest integer, ties to even, of |v| < 2^22: adding 1.5 * 2^23 leaves no bit for a fraction.
DS_INLINE F round_even(F v) {
  const F magic = splat(12582912.0f);
  return kept(v + magic) - magic;
}

// e^v to 2 ulp: v = n ln 2 + r, with a polynomial of degree 6 on |r| <= ln 2 / 2. Where the result
// would not be a normal number it is the smallest or largest one; a NaN stays one.
DS_INLINE F exponential(F v) {
  v = minimum(splat(88.37626f), maximum(splat(-87.33654f), v));
  // As in round_even; with 127 more, the low bits are the exponent of 2^n.
  const F magic = splat(12582912.0f + 127.0f);
  const F shifted = kept(v * 1.44269504f + magic);
  const F n = shifted - magic;
  F r = v - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return p * (F)((U)shifted << 23);
}

// Pairwise, the upper half onto the lower one, in the same order everywhere.
DS_INLINE float sum_of(F v) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                     _mm512_extractf32x8_ps((__m512)v, 1));
#else
  const __m256 eight = (__m256)v;
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float lanes[kWidth];
  store(lanes, v);
  for (int step = kWidth / 2; step > 0; step /= 2)
    for (int lane = 0; lane < step; ++lane) lanes[lane] += lanes[lane + step];
  return lanes[0];
#endif
}

// 1 / v to 1 ulp of finite v other than 0; 0 where that is not a normal number.
DS_INLINE F reciprocal(F v) {
#if defined(__AVX512F__)
  // One step of Newton's doubles the 14 bits; a division takes four times as long. With AVX2 it does
  // not, and the estimate has 12 bits, of which Newton's step makes 0.49999997 of 1 / 2.
  const F guess = (F)_mm512_rcp14_ps((__m512)v);
  return guess + guess * (1.0f - v * guess);
#else
  return 1.0f / v;
#endif
}

// 1 / (1 + e^-v) to 4 ulp.
DS_INLINE F sigmoid(F v) { return reciprocal(1.0f + exponential(-v)); }

// tanh to 4 ulp: its series near 0, where the difference below would cancel.
DS_INLINE F hyperbolic_tangent(F v) {
  const F size = absolute(v);
  const F e = exponential(size * -2.0f);
  const F far = (1.0f - e) * reciprocal(1.0f + e);
  const F square = v * v;
  F p = splat(2.1869488536e-2f);
  p = p * square - 5.3968253968e-2f;
  p = p * square + 1.3333333333e-1f;
  p = p * square - 3.3333333333e-1f;
  const F near = size * square * p + size;
  const F found = size < 0.25f ? near : far;
  return v < 0.0f ? -found : found;
}

// P(X <= v) for normal X, to 8 ulp for v <= 0 and 2 for v > 0, and its density, as erfcx(z) =
// e^(z^2) erfc(z) at z = |v| / sqrt(2), a polynomial in 1 / (1 + 0.38 z) fitted for this file.
struct Normal {
  F below, density;
};

DS_INLINE Normal normal(F v) {
  // An infinity as a number that is as good: its reciprocal would be a NaN.
  const F size = minimum(splat(1.0e9f), absolute(v));
  const F t = reciprocal(1.0f + size * 0.26870057686f);
  F p = splat(0.05896539000f);
  p = p * t - 0.26227260085f;
  p = p * t + 0.36384067923f;
  p = p * t - 0.16143116449f;
  p = p * t + 0.23000234738f;
  p = p * t + 0.13866124919f;
  p = p * t + 0.20390335039f;
  p = p * t + 0.21391983635f;
  p = p * t + 0.21441093261f;
  const F e = exponential(v * v * -0.5f);
  const F tail = p * t * e * 0.5f;
  return {v > 0.0f ? 1.0f - tail : tail, e * 0.39894228040f};
}

DS_INLINE float max_of(F v) {
  float largest = v[0];
  for (int lane = 1; lane < kWidth; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// --- Rows of any length -------------------------------------------------------------------------

// How much of a vector a step works on; lanes behind the end read as 0 and are not written.
struct Whole {};
struct Some {
  int count;
};

template <typename T>
DS_INLINE F load(const T* from, Whole) {
  return load(from);
}

template <typename T>
DS_INLINE F load(const T* from, Some part) {
  return load_some(from, part.count);
}

template <typename T>
DS_INLINE void store(T* to, F v, Whole) {
  store(to, v);
}

template <typename T>
DS_INLINE void store(T* to, F v, Some part) {
  store_some(to, v, part.count);
}

// `v`, with 0 in the lanes behind the end.
DS_INLINE F inside(F v, Whole) { return v; }
DS_INLINE F inside(F v, Some part) {
  for (int lane = 0; lane < kWidth; ++lane) v[lane] = lane < part.count ? v[lane] : 0.0f;
  return v;
}

// `v`, with a number below all others in the lanes behind the end.
DS_INLINE F below(F v, Whole) { return v; }
DS_INLINE F below(F v, Some part) {
  for (int lane = part.count; lane < kWidth; ++lane) v[lane] = -3.4e38f;
  return v;
}

// `body(i, part)` for each vector of [0, count): whole ones, then the rest.
template <typename Body>
DS_INLINE void for_vectors(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) body(i, Whole{});
  if (i < count) body(i, Some{(int)(count - i)});
}

}  // namespace DS_ISA
}  // namespace ds
