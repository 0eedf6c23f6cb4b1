#include "optim/adam8bit.h"

#include "common/pairs.h"
#include "optim/elementwise.h"

namespace ds {
namespace DS_ISA {
namespace {

constexpr int kBlock = kCodeBlock;
constexpr int kLowBits = 20;  // of a float, which are not in a code
constexpr uint32_t kNearest = 1u << (kLowBits - 1);
constexpr int kShiftMean = 889, kShiftSquare = 761;
constexpr float kSmallestScale = 1.17549435e-38f;

// What is added to the bits below a code, for elements at even and at odd places.
struct Noise {
  U even, odd;
};

// --- The code, as adam8bit.h has it --------------------------------------------------------------

constexpr int kHalfBits = kLowBits - 16;  // of the high half of a float, which are not in a code

// Bytes with their sign extended, so that the sign is already where a float has it.
DS_INLINE Pair decode_mean(W codes) {
  const W bits = (codes << kHalfBits) & (uint16_t)0x87f0;
  constexpr uint16_t lowest = kShiftMean << kHalfBits;
#if defined(__AVX512F__)
  const __mmask32 any = _mm512_test_epi16_mask((__m512i)codes, _mm512_set1_epi16(127));
  return from_high_halves(
      (W)_mm512_maskz_add_epi16(any, (__m512i)bits, _mm512_set1_epi16((short)lowest)));
#else
  return from_high_halves((codes & (uint16_t)127) == 0 ? W{} : bits + lowest);
#endif
}

DS_INLINE Pair decode_square(W codes) {
  return from_high_halves((codes + (uint16_t)kShiftSquare) << kHalfBits);
}

// Ratios to the scale as 16-bit numbers: sign, then eleven bits that count the codes.
DS_INLINE W rounded(Pair ratio, Noise noise) {
  return high_halves((U)ratio.even + noise.even, (U)ratio.odd + noise.odd) >> kHalfBits;
}

DS_INLINE W mean_codes(W rounded) {
  return less(rounded & (uint16_t)0x7ff, kShiftMean) | ((rounded >> 4) & (uint16_t)0x80);
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

// 1 / (sqrt(v) * root_scale + eps), to 2^-13 of itself with AVX-512 and to 3e-7 elsewhere: `v` and
// what it divides come from codes with steps of 2^-4. Divisions and roots of whole vectors would take
// longer than all the rest of a step, so both begin with the processor's estimate, of 14 bits with
// AVX-512, which stays as it is; one of 12 bits gets a step of Newton's. `v` is taken as at least
// 2^-126, whose root vanishes beside any eps in use; for infinity the result is NaN.
DS_INLINE F inverse_denominator(F v, const AdamStep& step) {
#if defined(__AVX512F__)
  // The compiler makes two instructions of `maximum`, because of what it says of NaN.
  const __m512 positive = _mm512_max_ps((__m512)v, (__m512)splat(kSmallestScale));
  const F root = (F)positive * (F)_mm512_rsqrt14_ps(positive);
  return (F)_mm512_rcp14_ps((__m512)(root * step.root_scale + step.eps));
#elif defined(__x86_64__)
  v = maximum(v, splat(kSmallestScale));
#if defined(__AVX2__)
  const F y = (F)_mm256_rsqrt_ps((__m256)v);
#else
  const F y = (F)_mm_rsqrt_ps((__m128)v);
#endif
  const F root = v * y;
  const F better = root + root * (0.5f - 0.5f * root * y);
  const F denominator = better * step.root_scale + step.eps;
#if defined(__AVX2__)
  const F z = (F)_mm256_rcp_ps((__m256)denominator);
#else
  const F z = (F)_mm_rcp_ps((__m128)denominator);
#endif
  return z + z * (1.0f - denominator * z);
#else
  return 1.0f / (square_root(maximum(v, splat(kSmallestScale))) * step.root_scale + step.eps);
#endif
}

// --- Stores around the caches --------------------------------------------------------------------

// Whether stores of pairs from element `begin` on are aligned; fp16 goes through the caches.
DS_INLINE bool pair_aligned(const void* stream, FloatType type, int64_t begin) {
  const int64_t size = type == FloatType::bf16 ? sizeof(W) : sizeof(F);
  return type != FloatType::fp16 && ((uintptr_t)stream + begin * size_of(type)) % size == 0;
}

DS_INLINE void stream_pair_as(FloatType type, void* to, int64_t i, Pair v) {
  if (type == FloatType::bf16) {
    const W words = high_halves(rounded_to_bf16(v.even), rounded_to_bf16(v.odd));
    return stream_bytes(static_cast<bf16*>(to) + i, &words, sizeof words);
  }
  const InOrder both = in_order(v);
  stream_bytes(static_cast<float*>(to) + i, &both.first, sizeof both.first);
  stream_bytes(static_cast<float*>(to) + i + kWidth, &both.second, sizeof both.second);
}

// --- A block -------------------------------------------------------------------------------------

struct Room {
  float mean[kBlock];  // the elements of a pair as its two vectors, one after the other
  float square[kBlock];
  uint32_t bits[kBlock / 2];  // those of a pair's element at an even place and of the next one
};

DS_INLINE Pair load_vectors(const float* from) { return {load(from), load(from + kWidth)}; }

DS_INLINE void store_vectors(float* to, Pair v) {
  store(to, v.even);
  store(to + kWidth, v.odd);
}

// A block in three loops, because the way of one vector from codes to codes is long: in one loop a
// processor could not look far enough ahead to find work while it waits.

struct Largest {
  U mean, square;
};

// What a block will need is asked for some blocks before: the arithmetic takes as long as memory
// does, and a processor by itself looks ahead too little to let both go on at once.
constexpr int64_t kAhead = 4 * kBlock;

DS_INLINE void prefetch(const StepStreams& s, const CodedStates& states, int64_t i) {
  constexpr int64_t line = 64;
  const char* param = static_cast<const char*>(s.param) + (i + kAhead) * size_of(s.param_type);
  const char* grad = static_cast<const char*>(s.grad) + (i + kAhead) * size_of(s.grad_type);
  for (int64_t at = 0; at < kPair * size_of(s.param_type); at += line)
    __builtin_prefetch(param + at, 1);
  for (int64_t at = 0; at < kPair * size_of(s.grad_type); at += line) __builtin_prefetch(grad + at);
  if (i % line != 0) return;
  __builtin_prefetch(states.mean + i + kAhead, 1);
  __builtin_prefetch(states.square + i + kAhead, 1);
}

// The new moments of elements i .. i + kBlock.
DS_INLINE Largest advance(const StepStreams& streams, const CodedStates& states,
                          const AdamStep& of, int64_t i, Room& room) {
  const StepStreams s = streams;
  const AdamStep step = of;
  // A decoded moment comes out as what the step keeps of it.
  const float mean_scale = states.mean_scales[i / kBlock] * (1.0f - step.one_minus_beta1);
  const float square_scale = states.square_scales[i / kBlock] * step.beta2;
  Largest largest = {};
  const auto advanced = [&](F& mean, F& square, F g) {
    mean = mean * mean_scale + g * step.one_minus_beta1;
    square = square * square_scale + g * g * step.one_minus_beta2;
    largest.mean = larger(largest.mean, (U)absolute(mean));
    largest.square = larger(largest.square, (U)square);
  };
  for (int j = 0; j < kBlock; j += kPair) {
    const int64_t at = i + j;
    prefetch(s, states, at);
    Pair g = load_pair_as(s.grad_type, s.grad, at);
    g.even *= s.grad_scale;
    g.odd *= s.grad_scale;
    if (step.l2 != 0.0f) {
      const Pair p = load_pair_as(s.param_type, s.param, at);
      g.even += p.even * step.l2;
      g.odd += p.odd * step.l2;
    }
    Pair mean = decode_mean(load_signed(states.mean + at));
    Pair square = decode_square(load_unsigned(states.square + at));
    advanced(mean.even, square.even, g.even);
    advanced(mean.odd, square.odd, g.odd);
    store_vectors(room.mean + j, mean);
    store_vectors(room.square + j, square);
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
  RandomBits random(s.seed, number / 2);
  const auto moved = [&](F p, F mean, F square) {
    return p * step.decay - mean * step.step_size * inverse_denominator(square, step);
  };
  for (int j = 0; j < kBlock; j += kPair) {
    const int64_t at = i + j;
    const Pair mean = load_vectors(room.mean + j), square = load_vectors(room.square + j);
    Pair p = load_pair_as(s.param_type, s.param, at);
    p = {moved(p.even, mean.even, square.even), moved(p.odd, mean.odd, square.odd)};
    U bits = {};
    if (kRandom) {
      bits = random.next();
      memcpy(room.bits + j / 2, &bits, sizeof bits);
    }
    if (kRandom && s.param_type == FloatType::bf16) {
      const W words = high_halves(rounded_by(p.even, bits & 0xffffu), rounded_by(p.odd, bits >> 16));
      memcpy(static_cast<bf16*>(s.param) + at, &words, sizeof words);
    } else {
      store_pair_as(s.param_type, s.param, at, p);
    }
    if (!s.copy) continue;
    if (s.param_type != FloatType::fp32) p = load_pair_as(s.param_type, s.param, at);
    if (copy_around) {
      stream_pair_as(s.copy_type, s.copy, at, p);
    } else {
      store_pair_as(s.copy_type, s.copy, at, p);
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
  const auto ratio = [](const float* from, float inverse) -> Pair {
    const Pair v = load_vectors(from);
    return {v.even * inverse, v.odd * inverse};
  };
  for (int j = 0; j < kBlock; j += 2 * kPair) {
    W mean[2], square[2];
    for (int k = 0; k < 2; ++k) {
      const int at = j + k * kPair;
      U low = kNearest - U{}, high = kNearest - U{};
      if (stochastic) {
        U bits;
        memcpy(&bits, room.bits + at / 2, sizeof bits);
        low = bits & 0xfffffu;
        high = bits >> 12;
      }
      mean[k] = rounded(ratio(room.mean + at, mean_inverse), {low, high});
      square[k] = rounded(ratio(room.square + at, square_inverse), {high, low});
    }
    store_bytes(to.mean + i + j, mean_codes(mean[0]), mean_codes(mean[1]));
    store_bytes(to.square + i + j, square_codes(square[0]), square_codes(square[1]));
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
      streams.around_cache && streams.copy && pair_aligned(streams.copy, streams.copy_type, begin);
  int64_t i = begin;
  for (; i + kBlock <= end; i += kBlock) one_block(streams, states, step, i, i, around);
  if (i < end) short_block(streams, states, step, i, (int)(end - i));
  if (around) finish_streams();
}

}  // namespace DS_ISA
}  // namespace ds
