#include "optim/adam8bit.h"

#include "common/simd.h"
#include "optim/elementwise.h"

namespace ds {
namespace DS_ISA {
namespace {

constexpr int kBlock = kCodeBlock;
constexpr int kLowBits = 20;  // of a float, which are not in a code
constexpr uint32_t kNearest = 1u << (kLowBits - 1);
constexpr int kShiftMean = 889, kShiftSquare = 761;
constexpr float kSmallestScale = 1.17549435e-38f;

// --- Bytes ---------------------------------------------------------------------------------------

DS_INLINE I load_signed(const uint8_t* from) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  B bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, I);
#endif
}

DS_INLINE I load_unsigned(const uint8_t* from) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, I);
#endif
}

// Twice as many numbers of 16 bits as an I has. In which order `narrow` puts those of two vectors
// is the processor's business; `store_bytes` puts them right.
typedef uint16_t W __attribute__((vector_size(kWidth * 4)));

// Numbers below 2^15.
DS_INLINE W narrow(U a, U b) {
#if defined(__AVX512F__)
  return (W)_mm512_packs_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (W)_mm256_packs_epi32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (W)_mm_packs_epi32((__m128i)a, (__m128i)b);
#else
  const H parts[2] = {__builtin_convertvector(a, H), __builtin_convertvector(b, H)};
  W joined;
  memcpy(&joined, parts, sizeof joined);
  return joined;
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

// Four vectors of numbers up to 255, which went through `narrow` two by two.
DS_INLINE void store_bytes(uint8_t* to, W low, W high) {
#if defined(__AVX512F__)
  const __m512i mixed = _mm512_packus_epi16((__m512i)low, (__m512i)high);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, mixed));
#elif defined(__AVX2__)
  const __m256i mixed = _mm256_packus_epi16((__m256i)low, (__m256i)high);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(mixed, order));
#elif defined(__x86_64__)
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi16((__m128i)low, (__m128i)high));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth * 2)));
  const Bytes parts[2] = {__builtin_convertvector(low, Bytes),
                          __builtin_convertvector(high, Bytes)};
  memcpy(to, parts, sizeof parts);
#endif
}

// --- The code, as adam8bit.h has it --------------------------------------------------------------

// Bytes with their sign extended, so that the sign is already where a float has it.
DS_INLINE F decode_mean(I codes, float scale) {
  const I bits = ((codes << kLowBits) & (I)((U{} + 0x87f00000u))) + (kShiftMean << kLowBits);
#if defined(__AVX512F__)
  const __mmask16 any = _mm512_test_epi32_mask((__m512i)codes, _mm512_set1_epi32(127));
  return (F)_mm512_maskz_mov_epi32(any, (__m512i)bits) * scale;
#else
  return (F)((codes & 127) == 0 ? I{} : bits) * scale;
#endif
}

DS_INLINE F decode_square(I codes, float scale) {
  return (F)((codes + kShiftSquare) << kLowBits) * scale;
}

// The sign stays above the eleven bits that are wanted.
DS_INLINE U rounded_bits(F ratio, U noise) { return ((U)ratio + noise) >> kLowBits; }

DS_INLINE W mean_codes(W rounded) {
  return less(rounded & 0x7ff, kShiftMean) | ((rounded >> 4) & 0x80);
}

DS_INLINE W square_codes(W rounded) { return less(rounded, kShiftSquare); }

DS_INLINE U larger(U a, U b) { return a > b ? a : b; }

// The scale of a block whose largest number has these bits. As integers, a NaN is larger than
// infinity, and that than all numbers: neither gets lost.
DS_INLINE float scale_of(U largest) {
  uint32_t bits = largest[0];
  for (int lane = 1; lane < kWidth; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale > 0.0f && scale < kSmallestScale ? kSmallestScale : scale;
}

// A little less than 1 / scale, so that no number of the block times it is above 1.
DS_INLINE float inverse_of(float scale) {
  return scale == 0.0f ? 0.0f : (1.0f / scale) * (1.0f - 0x1p-23f);
}

// --- Arithmetic ----------------------------------------------------------------------------------

// 1 / (sqrt(v) * root_scale + eps) to 3e-7. Divisions and roots of whole vectors would take longer
// than all the rest of a step, so both begin with the processor's estimate. `v` is taken as at
// least 2^-126, whose root vanishes beside any eps in use; for infinity the result is NaN.
DS_INLINE F inverse_denominator(F v, const AdamStep& step) {
#if defined(__AVX512F__)
  // The compiler makes two instructions of `maximum`, because of what it says of NaN.
  v = (F)_mm512_max_ps((__m512)v, (__m512)splat(kSmallestScale));
#else
  v = maximum(v, splat(kSmallestScale));
#endif
#if defined(__AVX512F__)
  F y = (F)_mm512_rsqrt14_ps((__m512)v);
#elif defined(__AVX2__)
  F y = (F)_mm256_rsqrt_ps((__m256)v);
#elif defined(__x86_64__)
  F y = (F)_mm_rsqrt_ps((__m128)v);
#else
  return 1.0f / (square_root(v) * step.root_scale + step.eps);
#endif
#if defined(__x86_64__)
  const F root = v * y;
  const F better = root + root * (0.5f - 0.5f * root * y);  // a step of Newton's
  const F denominator = better * step.root_scale + step.eps;
#if defined(__AVX512F__)
  const F z = (F)_mm512_rcp14_ps((__m512)denominator);
#elif defined(__AVX2__)
  const F z = (F)_mm256_rcp_ps((__m256)denominator);
#else
  const F z = (F)_mm_rcp_ps((__m128)denominator);
#endif
  return z + z * (1.0f - denominator * z);
#endif
}

// --- A block -------------------------------------------------------------------------------------

struct Room {
  float mean[kBlock];
  float square[kBlock];
  uint32_t bits[kBlock];
};

// A block in three loops, because the way of one vector from codes to codes is long: in one loop a
// processor could not look far enough ahead to find work while it waits.

struct Largest {
  U mean, square;
};

// The new moments of elements i .. i + kBlock.
DS_INLINE Largest advance(const StepStreams& streams, const CodedStates& states,
                          const AdamStep& of, int64_t i, Room& room) {
  const StepStreams s = streams;
  const AdamStep step = of;
  // A decoded moment comes out as what the step keeps of it.
  const float mean_scale = states.mean_scales[i / kBlock] * (1.0f - step.one_minus_beta1);
  const float square_scale = states.square_scales[i / kBlock] * step.beta2;
  Largest largest = {};
  for (int j = 0; j < kBlock; j += kWidth) {
    const int64_t at = i + j;
    F g = load_as(s.grad_type, s.grad, at) * s.grad_scale;
    if (step.l2 != 0.0f) g += load_as(s.param_type, s.param, at) * step.l2;
    const F mean =
        decode_mean(load_signed(states.mean + at), mean_scale) + g * step.one_minus_beta1;
    const F square = decode_square(load_unsigned(states.square + at), square_scale) +
                     g * g * step.one_minus_beta2;
    store(room.mean + j, mean);
    store(room.square + j, square);
    largest.mean = larger(largest.mean, (U)absolute(mean));
    largest.square = larger(largest.square, (U)square);
  }
  return largest;
}

// The new parameters, and the random bits; `number` is that of element i for those. What is random
// is decided before the loop, and what the loop needs is copied: its constants stay in registers.
template <bool kRandom>
DS_INLINE void move_by(const StepStreams& streams, const AdamStep& of, int64_t i, int64_t number,
                       bool copy_around, Room& room) {
  const StepStreams s = streams;
  const AdamStep step = of;
  RandomBits random(s.seed, number);
  for (int j = 0; j < kBlock; j += kWidth) {
    const int64_t at = i + j;
    const F mean = load(room.mean + j), square = load(room.square + j);
    F p = load_as(s.param_type, s.param, at);
    p = p * step.decay - mean * step.step_size * inverse_denominator(square, step);
    U bits = {};
    if (kRandom) {
      bits = random.next();
      memcpy(room.bits + j, &bits, sizeof bits);
    }
    store_rounded(s.param_type, s.param, at, p, kRandom, bits & 0xffffu);
    if (!s.copy) continue;
    if (s.param_type != FloatType::fp32) p = load_as(s.param_type, s.param, at);
    if (copy_around) {
      stream_as(s.copy_type, s.copy, at, p);
    } else {
      store_as(s.copy_type, s.copy, at, p);
    }
  }
}

DS_INLINE void move(const StepStreams& s, const AdamStep& step, int64_t i, int64_t number,
                    bool copy_around, Room& room) {
  if (s.stochastic) return move_by<true>(s, step, i, number, copy_around, room);
  move_by<false>(s, step, i, number, copy_around, room);
}

// The new codes, to `to` and what follows it.
DS_INLINE void encode(const Room& room, bool stochastic, Largest largest, int64_t i,
                      const CodedStates& to) {
  const float mean_scale = scale_of(largest.mean), square_scale = scale_of(largest.square);
  to.mean_scales[i / kBlock] = mean_scale;
  to.square_scales[i / kBlock] = square_scale;
  const float mean_inverse = inverse_of(mean_scale), square_inverse = inverse_of(square_scale);
  for (int j = 0; j < kBlock; j += 4 * kWidth) {
    U mean[4], square[4];
    for (int k = 0; k < 4; ++k) {
      const int at = j + k * kWidth;
      U mean_noise = kNearest - U{}, square_noise = kNearest - U{};
      if (stochastic) {
        U bits;
        memcpy(&bits, room.bits + at, sizeof bits);
        mean_noise = bits & 0xfffffu;
        square_noise = bits >> 12;
      }
      mean[k] = rounded_bits(load(room.mean + at) * mean_inverse, mean_noise);
      square[k] = rounded_bits(load(room.square + at) * square_inverse, square_noise);
    }
    store_bytes(to.mean + i + j, mean_codes(narrow(mean[0], mean[1])),
                mean_codes(narrow(mean[2], mean[3])));
    store_bytes(to.square + i + j, square_codes(narrow(square[0], square[1])),
                square_codes(narrow(square[2], square[3])));
  }
}

DS_INLINE void one_block(const StepStreams& s, const CodedStates& states, const AdamStep& step,
                         int64_t i, int64_t number, bool copy_around) {
  Room room;
  const Largest largest = advance(s, states, step, i, room);
  move(s, step, i, number, copy_around, room);
  encode(room, s.stochastic, largest, i, states);
}

// The last block, of fewer elements, in padded copies of the streams. Padding of zeros stays zero.
void short_block(const StepStreams& s, const CodedStates& states, const AdamStep& step, int64_t i,
                 int count) {
  float param[kBlock] = {}, grad[kBlock] = {}, copy[kBlock];
  uint8_t mean[kBlock] = {}, square[kBlock] = {};
  const int64_t param_size = size_of(s.param_type), grad_size = size_of(s.grad_type);
  char* param_at = static_cast<char*>(s.param) + i * param_size;
  memcpy(param, param_at, count * param_size);
  memcpy(grad, static_cast<const char*>(s.grad) + i * grad_size, count * grad_size);
  memcpy(mean, states.mean + i, count);
  memcpy(square, states.square + i, count);
  StepStreams padded = s;
  padded.param = param;
  padded.grad = grad;
  if (s.copy) padded.copy = copy;
  const CodedStates own{mean, states.mean_scales + i / kBlock, square,
                        states.square_scales + i / kBlock};
  one_block(padded, own, step, 0, i, false);
  memcpy(param_at, param, count * param_size);
  memcpy(states.mean + i, mean, count);
  memcpy(states.square + i, square, count);
  if (!s.copy) return;
  const int64_t copy_size = size_of(s.copy_type);
  memcpy(static_cast<char*>(s.copy) + i * copy_size, copy, count * copy_size);
}

}  // namespace

void adam8bit_elements(const StepStreams& streams, const CodedStates& states,
                       const AdamStep& step, int64_t begin, int64_t end) {
  const bool around =
      streams.around_cache && streams.copy && aligned(streams.copy, streams.copy_type, begin);
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) one_block(streams, states, step, i, i, around);
  if (i < end) short_block(streams, states, step, i, (int)(end - i));
  if (around) finish_streams();
}

}  // namespace DS_ISA
}  // namespace ds
