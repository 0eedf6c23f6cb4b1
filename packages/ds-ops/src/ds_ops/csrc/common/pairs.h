// Vectors two by two: the numbers at even places of a stream and those at odd ones.
//
// In a vector of bf16, each 32 bits hold two: those in the high half are a float already, with noise
// below, and those in the low half are one after a shift. So both come and go without the shuffles
// that keeping them in order takes, which a kernel without a look at its neighbours does not need.
// Bytes are the same after they are widened to 16 bits. For kernel files.
#pragma once

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {

constexpr int kPair = 2 * kWidth;  // numbers

struct Pair {
  F even, odd;
};

// Numbers of 16 bits, in the order of memory.
typedef uint16_t W __attribute__((vector_size(kWidth * 4)));

// --- Halves -------------------------------------------------------------------------------------

// The floats whose high bits are `words`, the rest 0.
DS_INLINE Pair from_high_halves(W words) {
  const U bits = (U)words;
  return {(F)(bits << 16), (F)(bits & 0xffff0000u)};
}

DS_INLINE W high_halves(U even, U odd) {
#if defined(__AVX512F__)
  return (W)_mm512_mask_blend_epi16(0xaaaaaaaau, (__m512i)(even >> 16), (__m512i)odd);
#elif defined(__AVX2__)
  return (W)_mm256_blend_epi16((__m256i)(even >> 16), (__m256i)odd, 0xaa);
#else
  return (W)((even >> 16) | (odd & 0xffff0000u));
#endif
}

// --- Order --------------------------------------------------------------------------------------

DS_INLINE Pair apart(F first, F second) {
#if defined(__AVX512F__)
  const __m512i even =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {(F)_mm512_permutex2var_ps((__m512)first, even, (__m512)second),
          (F)_mm512_permutex2var_ps((__m512)first, odd, (__m512)second)};
#elif defined(__AVX2__)
  const __m256 even = _mm256_shuffle_ps((__m256)first, (__m256)second, 0x88);
  const __m256 odd = _mm256_shuffle_ps((__m256)first, (__m256)second, 0xdd);
  return {(F)_mm256_permute4x64_pd((__m256d)even, 0xd8),
          (F)_mm256_permute4x64_pd((__m256d)odd, 0xd8)};
#else
  return {F{first[0], first[2], second[0], second[2]}, F{first[1], first[3], second[1], second[3]}};
#endif
}

struct InOrder {
  F first, second;
};

DS_INLINE InOrder in_order(Pair v) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {(F)_mm512_permutex2var_ps((__m512)v.even, first, (__m512)v.odd),
          (F)_mm512_permutex2var_ps((__m512)v.even, second, (__m512)v.odd)};
#elif defined(__AVX2__)
  const __m256 low = _mm256_unpacklo_ps((__m256)v.even, (__m256)v.odd);
  const __m256 high = _mm256_unpackhi_ps((__m256)v.even, (__m256)v.odd);
  return {(F)_mm256_permute2f128_ps(low, high, 0x20), (F)_mm256_permute2f128_ps(low, high, 0x31)};
#else
  return {F{v.even[0], v.odd[0], v.even[1], v.odd[1]}, F{v.even[2], v.odd[2], v.even[3], v.odd[3]}};
#endif
}

// --- Loads and stores ---------------------------------------------------------------------------

template <typename T>
DS_INLINE Pair load_pair(const T* from) {
  return apart(load(from), load(from + kWidth));
}

DS_INLINE Pair load_pair(const bf16* from) {
  W words;
  memcpy(&words, from, sizeof words);
  return from_high_halves(words);
}

template <typename T>
DS_INLINE void store_pair(T* to, Pair v) {
  const InOrder both = in_order(v);
  store(to, both.first);
  store(to + kWidth, both.second);
}

DS_INLINE void store_pair(bf16* to, Pair v) {
  const W words = high_halves(rounded_to_bf16(v.even), rounded_to_bf16(v.odd));
  memcpy(to, &words, sizeof words);
}

DS_INLINE Pair load_pair_as(FloatType type, const void* from, int64_t i) {
  if (type == FloatType::fp32) return load_pair(static_cast<const float*>(from) + i);
  if (type == FloatType::bf16) return load_pair(static_cast<const bf16*>(from) + i);
  return load_pair(static_cast<const fp16*>(from) + i);
}

DS_INLINE void store_pair_as(FloatType type, void* to, int64_t i, Pair v) {
  if (type == FloatType::fp32) return store_pair(static_cast<float*>(to) + i, v);
  if (type == FloatType::bf16) return store_pair(static_cast<bf16*>(to) + i, v);
  store_pair(static_cast<fp16*>(to) + i, v);
}

// kPair bytes as 16-bit numbers.
DS_INLINE W load_signed(const uint8_t* from) {
#if defined(__AVX512F__)
  return (W)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (W)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
  typedef int8_t Bytes __attribute__((vector_size(kPair)));
  typedef int16_t Words __attribute__((vector_size(kPair * 2)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return (W)__builtin_convertvector(bytes, Words);
#endif
}

DS_INLINE W load_unsigned(const uint8_t* from) {
#if defined(__AVX512F__)
  return (W)_mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__)
  return (W)_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)from));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kPair)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, W);
#endif
}

// 2 kPair numbers up to 255 as bytes.
DS_INLINE void store_bytes(uint8_t* to, W first, W second) {
#if defined(__AVX512F__)
  const __m512i mixed = _mm512_packus_epi16((__m512i)first, (__m512i)second);
  const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi64(order, mixed));
#elif defined(__AVX2__)
  const __m256i mixed = _mm256_packus_epi16((__m256i)first, (__m256i)second);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(mixed, 0xd8));
#elif defined(__x86_64__)
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi16((__m128i)first, (__m128i)second));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kPair)));
  const Bytes parts[2] = {__builtin_convertvector(first, Bytes),
                          __builtin_convertvector(second, Bytes)};
  memcpy(to, parts, sizeof parts);
#endif
}

// a - b, or 0 where that is negative.
DS_INLINE W less(W a, uint16_t b) {
#if defined(__AVX512F__)
  return (W)_mm512_subs_epu16((__m512i)a, _mm512_set1_epi16((short)b));
#elif defined(__AVX2__)
  return (W)_mm256_subs_epu16((__m256i)a, _mm256_set1_epi16((short)b));
#elif defined(__x86_64__)
  return (W)_mm_subs_epu16((__m128i)a, _mm_set1_epi16((short)b));
#else
  return a > b ? a - b : W{};
#endif
}

}  // namespace DS_ISA
}  // namespace ds
