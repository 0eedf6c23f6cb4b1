#include "quant/sign_pack.h"

#include "common/simd.h"
#include "quant/floats.h"

namespace ds {
namespace DS_ISA {
namespace {

// Numbers whose signs are written at once; room behind the end of a part.
constexpr int64_t kGroup = 64;

// One bit per lane: is it >= 0?
DS_INLINE uint32_t signs_of(F v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps((__m256)(v >= 0.0f));
#elif defined(__x86_64__)
  return (uint32_t)_mm_movemask_ps((__m128)(v >= 0.0f));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= (uint32_t)(v[lane] >= 0.0f) << lane;
  return bits;
#endif
}

// x + error, with zeros up to a whole group.
void load_sum(const SignCall& call, int64_t begin, int64_t count, float* to) {
  load_floats(call.x, call.x_type, begin, to, count);
  if (call.error != nullptr) {
    float error[kSignPart + kGroup];
    load_floats(call.error, call.error_type, begin, error, count);
    for (int64_t i = 0; i < count; i += kWidth) store(to + i, load(to + i) + load(error + i));
  }
  for (int64_t i = count; i % kGroup != 0; ++i) to[i] = 0.0f;
}

// v's own sign, 0 counting as positive, on a positive number.
DS_INLINE F with_sign_of(F v, F number) { return v >= 0.0f ? number : -number; }

}  // namespace

double pack_signs(const SignCall& call, int64_t begin, int64_t count, uint8_t* codes) {
  float values[kSignPart + kGroup];
  load_sum(call, begin, count, values);
  F sums[4] = {};
  for (int64_t i = 0; i < count; i += kGroup) {
    uint64_t bits = 0;
    for (int j = 0; j < kGroup / kWidth; ++j) {
      const F v = load(values + i + j * kWidth);
      sums[j % 4] += call.squares ? v * v : absolute(v);
      bits |= (uint64_t)signs_of(v) << (j * kWidth);
    }
    if (i + kGroup <= count) {
      memcpy(codes + i / 8, &bits, 8);
    } else {  // behind the end, zeros have become ones
      bits &= ((uint64_t)1 << (count - i)) - 1;
      memcpy(codes + i / 8, &bits, (count - i + 7) / 8);
    }
  }
  return (double)sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void update_sign_error(const SignCall& call, int64_t begin, int64_t count, float scale) {
  float values[kSignPart + kGroup];
  load_sum(call, begin, count, values);
  for (int64_t i = 0; i < count; i += kWidth) {
    const F v = load(values + i);
    store(values + i, v - with_sign_of(v, splat(scale)));
  }
  store_floats(values, call.error, call.error_type, begin, count);
}

void unpack_signs(const uint8_t* codes, void* y, FloatType y_type, int64_t begin, int64_t count,
                  float scale) {
  float values[kSignPart + kGroup];
  I lane = {};
  for (int j = 0; j < kWidth; ++j) lane[j] = j;
  for (int64_t i = 0; i < count; i += kGroup) {
    uint64_t bits = 0;
    memcpy(&bits, codes + i / 8, i + kGroup <= count ? 8 : (count - i + 7) / 8);
    for (int j = 0; j < kGroup / kWidth; ++j) {
      const I sign = splat_int((int32_t)(bits >> (j * kWidth)));
      const I negative = ~(sign >> lane) << 31;
      store(values + i + j * kWidth, (F)((I)splat(scale) ^ negative));
    }
  }
  store_floats(values, y, y_type, begin, count);
}

}  // namespace DS_ISA
}  // namespace ds
