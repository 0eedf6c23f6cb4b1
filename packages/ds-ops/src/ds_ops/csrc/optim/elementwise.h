// The loop that all optimizers share: load, scale, update, store, for one vector at a time.
//
// Included only by kernel files. The types of the streams are looked at for each vector: that is
// the same jump every time, which a processor predicts, and costs nothing beside the memory that
// is waited for; a loop for each combination of types would be some hundred loops.
#pragma once

#include "common/simd.h"
#include "optim/rounding.h"
#include "optim/step.h"

namespace ds {
namespace DS_ISA {

DS_INLINE F load_as(FloatType type, const void* from, int64_t i) {
  if (type == FloatType::fp32) return load(static_cast<const float*>(from) + i);
  if (type == FloatType::bf16) return load(static_cast<const bf16*>(from) + i);
  return load(static_cast<const fp16*>(from) + i);
}

DS_INLINE void store_as(FloatType type, void* to, int64_t i, F v) {
  if (type == FloatType::fp32) return store(static_cast<float*>(to) + i, v);
  if (type == FloatType::bf16) return store(static_cast<bf16*>(to) + i, v);
  return store(static_cast<fp16*>(to) + i, v);
}

// --- Random bits ---------------------------------------------------------------------------------

// Those of element, element + kWidth, ...: a vector of them each time. The high half of the
// element's number must not change on the way.
struct RandomBits {
  U counter;
  U k1, first, second;

  inline __attribute__((always_inline)) RandomBits(uint64_t seed, int64_t element) {
    const RoundingKeys keys = rounding_keys(seed, element);
    for (int lane = 0; lane < kWidth; ++lane) counter[lane] = (uint32_t)lane * 0x9e3779b9u;
    counter += (uint32_t)element * 0x9e3779b9u + keys.k0;
    k1 = keys.k1 + U{};
    first = 0x7feb352du + U{};
    second = 0x846ca68bu + U{};
  }

  inline __attribute__((always_inline)) U next() {
    U x = (counter ^ (counter >> 16)) * first;
    x = (x ^ (x >> 15) ^ k1) * second;
    counter += kWidth * 0x9e3779b9u;
    return x ^ (x >> 16);
  }
};

// Bits whose high half is the bf16 below or above `v`, the result of a computation, by 16 random
// bits. Infinities stay, and so does NaN, which is quiet after any computation: without its low bits
// it still is a NaN.
DS_INLINE U rounded_by(F v, U bits16) {
#if defined(__AVX512F__)
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  return (U)_mm512_mask_add_epi32((__m512i)v, number, (__m512i)v, (__m512i)bits16);
#else
  return (U)v + (bits16 & (U)(v == v));
#endif
}

DS_INLINE void store_random(bf16* to, F v, U bits16) {
  const H bits = __builtin_convertvector(rounded_by(v, bits16) >> 16, H);
  memcpy(to, &bits, sizeof bits);
}

// --- Stores around the caches --------------------------------------------------------------------

// To an address that is a multiple of the vector's size.
DS_INLINE void stream_bytes(void* to, const void* vector, int bytes) {
#if defined(__AVX512F__)
  if (bytes == 64)
    return _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(vector));
#endif
#if defined(__AVX2__)
  if (bytes == 32)
    return _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)vector));
#endif
#if defined(__x86_64__)
  if (bytes == 16)
    return _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)vector));
#endif
  memcpy(to, vector, bytes);
}

DS_INLINE void stream_as(FloatType type, void* to, int64_t i, F v) {
  if (type == FloatType::fp32) return stream_bytes(static_cast<float*>(to) + i, &v, sizeof v);
  uint16_t halves[kWidth];
  store_as(type, halves, 0, v);
  stream_bytes(static_cast<uint16_t*>(to) + i, halves, sizeof halves);
}

// Waits until they have arrived, before another thread may be told that they have.
DS_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// --- The loop ------------------------------------------------------------------------------------

// Whether stores around the caches at elements begin, begin + kWidth, ... would be aligned.
DS_INLINE bool aligned(const void* stream, FloatType type, int64_t begin) {
  return ((uintptr_t)stream + begin * size_of(type)) % (kWidth * size_of(type)) == 0;
}

DS_INLINE void keep_for_undo(void* to, const void* from, FloatType type, int64_t i, bool around) {
  const int64_t at = i * size_of(type);
  char* target = static_cast<char*>(to) + at;
  const char* source = static_cast<const char*>(from) + at;
  if (type == FloatType::fp32) {
    if (around) return stream_bytes(target, source, kWidth * 4);
    memcpy(target, source, kWidth * 4);
  } else {
    if (around) return stream_bytes(target, source, kWidth * 2);
    memcpy(target, source, kWidth * 2);
  }
}

DS_INLINE void store_rounded(FloatType type, void* to, int64_t i, F v, bool stochastic, U bits16) {
  if (stochastic && type == FloatType::bf16) {
    return store_random(static_cast<bf16*>(to) + i, v, bits16);
  }
  store_as(type, to, i, v);
}

// Elements i .. i + kWidth of the streams; `bits` are their random bits.
//
// A rule has kStates, how many states it has; kWrites, whether the parameter is written; and
// `F operator()(F p, F g, F* states)`, which returns the new parameter.
template <typename Rule>
DS_INLINE void one_vector(const StepStreams& s, Rule& rule, int64_t i, U bits, bool copy_around,
                          bool undo_around) {
  if (s.undo[0]) {
    keep_for_undo(s.undo[0], s.param, s.param_type, i, undo_around);
    for (int k = 0; k < Rule::kStates; ++k)
      keep_for_undo(s.undo[k + 1], s.states[k], s.state_type, i, undo_around);
  }
  F state[2];
  for (int k = 0; k < Rule::kStates; ++k) state[k] = load_as(s.state_type, s.states[k], i);
  const F g = load_as(s.grad_type, s.grad, i) * s.grad_scale;
  F p = rule(load_as(s.param_type, s.param, i), g, state);
  if (Rule::kWrites) store_rounded(s.param_type, s.param, i, p, s.stochastic, bits & 0xffffu);
  const U state_bits[2] = {bits >> 16, (bits * 0x9e3779b1u) >> 16};
  for (int k = 0; k < Rule::kStates; ++k)
    store_rounded(s.state_type, s.states[k], i, state[k], s.stochastic, state_bits[k]);
  if (!s.copy) return;
  // The copy is of what was stored, not of what was computed.
  if (Rule::kWrites && s.param_type != FloatType::fp32) p = load_as(s.param_type, s.param, i);
  if (copy_around) return stream_as(s.copy_type, s.copy, i, p);
  store_as(s.copy_type, s.copy, i, p);
}

// The last `count` < kWidth elements, in padded copies of the streams.
template <typename Rule>
static void few_elements(const StepStreams& s, Rule& rule, int64_t i, int count, U bits) {
  constexpr int kStreams = 8;
  char padded[kStreams][kWidth * 4] = {};
  StepStreams few = s;
  int used = 0;
  const auto bring = [&](const void* from, FloatType type) -> void* {
    const int64_t bytes = size_of(type);
    memcpy(padded[used], static_cast<const char*>(from) + i * bytes, count * bytes);
    return padded[used++];
  };
  const auto take = [&](void* to, const void* from, FloatType type) {
    const int64_t bytes = size_of(type);
    memcpy(static_cast<char*>(to) + i * bytes, from, count * bytes);
  };
  few.param = bring(s.param, s.param_type);
  few.grad = bring(s.grad, s.grad_type);
  for (int k = 0; k < Rule::kStates; ++k) few.states[k] = bring(s.states[k], s.state_type);
  if (s.copy) few.copy = padded[used++];
  if (s.undo[0])
    for (int k = 0; k <= Rule::kStates; ++k) few.undo[k] = padded[used++];
  one_vector(few, rule, 0, bits, false, false);
  if (Rule::kWrites) take(s.param, few.param, s.param_type);
  for (int k = 0; k < Rule::kStates; ++k) take(s.states[k], few.states[k], s.state_type);
  if (s.copy) take(s.copy, few.copy, s.copy_type);
  if (!s.undo[0]) return;
  take(s.undo[0], few.undo[0], s.param_type);
  for (int k = 0; k < Rule::kStates; ++k) take(s.undo[k + 1], few.undo[k + 1], s.state_type);
}

template <typename Rule>
DS_INLINE void for_elements(const StepStreams& s, Rule& rule, int64_t begin, int64_t end) {
  const bool copy_around = s.around_cache && s.copy && aligned(s.copy, s.copy_type, begin);
  bool undo_around = s.around_cache && s.undo[0] && aligned(s.undo[0], s.param_type, begin);
  for (int k = 0; k < Rule::kStates; ++k)
    undo_around = undo_around && aligned(s.undo[k + 1], s.state_type, begin);
  RandomBits random(s.seed, begin);
  U bits = {};
  int64_t i = begin;
  for (; i + kWidth <= end; i += kWidth) {
    if (s.stochastic) {
      if ((uint32_t)i < kWidth) random = RandomBits(s.seed, i);  // the high half has changed
      bits = random.next();
    }
    one_vector(s, rule, i, bits, copy_around, undo_around);
  }
  if (i < end) {
    if (s.stochastic) bits = RandomBits(s.seed, i).next();
    few_elements(s, rule, i, (int)(end - i), bits);
  }
  if (copy_around || undo_around) finish_streams();
}

}  // namespace DS_ISA
}  // namespace ds
