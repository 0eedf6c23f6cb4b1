#include "optim/adam8bit.h"

#include "common/simd.h"
#include "optim/elementwise.h"

namespace ds {
namespace DS_ISA {
namespace {

constexpr int kBlock = kCodeBlock;
constexpr int kLowBits = 20;  // of a float, which are not in a code
constexpr int32_t kNearest = 1 << (kLowBits - 1);
constexpr int32_t kTopMean = 127, kShiftMean = 889;
constexpr int32_t kTopSquare = 255, kShiftSquare = 761;
constexpr float kSmallestScale = 1.17549435e-38f;

// --- Bytes ----------------------------------------------------------------------------------------

DS_INLINE I load_codes(const uint8_t* from) {
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

// Four vectors of numbers in 0 .. 255, which the processors can pack best together.
DS_INLINE void store_codes(uint8_t* to, const I* codes) {
#if defined(__AVX512F__)
  for (int j = 0; j < 4; ++j)
    _mm_storeu_si128((__m128i*)(to + 16 * j), _mm512_cvtepi32_epi8((__m512i)codes[j]));
#elif defined(__AVX2__)
  const __m256i low = _mm256_packs_epi32((__m256i)codes[0], (__m256i)codes[1]);
  const __m256i high = _mm256_packs_epi32((__m256i)codes[2], (__m256i)codes[3]);
  // Packing goes on within each half: afterwards the groups of four bytes are out of order.
  const __m256i mixed = _mm256_packus_epi16(low, high);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(mixed, order));
#elif defined(__x86_64__)
  const __m128i low = _mm_packs_epi32((__m128i)codes[0], (__m128i)codes[1]);
  const __m128i high = _mm_packs_epi32((__m128i)codes[2], (__m128i)codes[3]);
  _mm_storeu_si128((__m128i*)to, _mm_packus_epi16(low, high));
#else
  typedef uint8_t Bytes __attribute__((vector_size(kWidth)));
  for (int j = 0; j < 4; ++j) {
    const Bytes bytes = __builtin_convertvector(codes[j], Bytes);
    memcpy(to + j * kWidth, &bytes, sizeof bytes);
  }
#endif
}

// --- The code, as adam8bit.h has it ---------------------------------------------------------------

DS_INLINE I larger(I a, I b) { return a > b ? a : b; }
DS_INLINE I smaller(I a, I b) { return a < b ? a : b; }

DS_INLINE F decode_mean(I codes, float scale) {
  const I magnitude = codes & kTopMean;
  const I bits = ((magnitude + kShiftMean) << kLowBits) | ((codes & 128) << 24);
  return (F)(magnitude == 0 ? I{} : bits) * scale;
}

DS_INLINE F decode_square(I codes, float scale) {
  const I bits = (codes + kShiftSquare) << kLowBits;
  return (F)(codes == 0 ? I{} : bits) * scale;
}

DS_INLINE I encode_mean(F mean, float inverse, I noise) {
  const I high = ((I)(absolute(mean) * inverse) + noise) >> kLowBits;
  const I magnitude = smaller(larger(high - kShiftMean, I{}), splat_int(kTopMean));
  return magnitude | (I)(((U)mean >> 24) & 128u);
}

DS_INLINE I encode_square(F square, float inverse, I noise) {
  const I high = ((I)(square * inverse) + noise) >> kLowBits;
  const I least = square > 0.0f ? splat_int(1) : I{};
  return smaller(larger(high - kShiftSquare, least), splat_int(kTopSquare));
}

// The scale of a block whose largest number has these bits. As integers, a NaN is larger than
// infinity, and that than all numbers: neither gets lost.
DS_INLINE float scale_of(I largest) {
  int32_t bits = largest[0];
  for (int lane = 1; lane < kWidth; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale > 0.0f && scale < kSmallestScale ? kSmallestScale : scale;
}

DS_INLINE float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// --- A block --------------------------------------------------------------------------------------

struct Room {
  float mean[kBlock];
  float square[kBlock];
  uint32_t bits[kBlock];
};

// Elements i .. i + kBlock of the streams; `number` is that of the first for the random bits.
DS_INLINE void one_block(const StepStreams& s, const CodedStates& states, const AdamStep& step,
                         int64_t i, int64_t number, bool copy_around) {
  Room room;
  const RoundingKeys keys = rounding_keys(s.seed, number);
  const float mean_scale = states.mean_scales[i / kBlock];
  const float square_scale = states.square_scales[i / kBlock];
  I largest_mean = {}, largest_square = {};
  for (int j = 0; j < kBlock; j += kWidth) {
    const int64_t at = i + j;
    F p = load_as(s.param_type, s.param, at);
    F g = load_as(s.grad_type, s.grad, at) * s.grad_scale;
    if (step.l2 != 0.0f) g += p * step.l2;
    F mean = decode_mean(load_codes(states.mean + at), mean_scale);
    F square = decode_square(load_codes(states.square + at), square_scale);
    mean = mean + (g - mean) * step.one_minus_beta1;
    square = square * step.beta2 + g * g * step.one_minus_beta2;
    const F denominator = square_root(square) * step.root_scale + step.eps;
    p = p * step.decay - mean * step.step_size / denominator;
    store(room.mean + j, mean);
    store(room.square + j, square);
    largest_mean = larger(largest_mean, (I)absolute(mean));
    largest_square = larger(largest_square, (I)absolute(square));
    U bits = {};
    if (s.stochastic) {
      bits = random_bits(keys, number + j);
      memcpy(room.bits + j, &bits, sizeof bits);
    }
    store_rounded(s.param_type, s.param, at, p, s.stochastic, bits & 0xffffu);
    if (!s.copy) continue;
    if (s.param_type != Dtype::fp32) p = load_as(s.param_type, s.param, at);
    if (copy_around) {
      stream_as(s.copy_type, s.copy, at, p);
    } else {
      store_as(s.copy_type, s.copy, at, p);
    }
  }
  const float new_mean_scale = scale_of(largest_mean);
  const float new_square_scale = scale_of(largest_square);
  states.mean_scales[i / kBlock] = new_mean_scale;
  states.square_scales[i / kBlock] = new_square_scale;
  const float mean_inverse = inverse_of(new_mean_scale);
  const float square_inverse = inverse_of(new_square_scale);
  for (int j = 0; j < kBlock; j += 4 * kWidth) {
    I mean_codes[4], square_codes[4];
    for (int k = 0; k < 4; ++k) {
      const int at = j + k * kWidth;
      I mean_noise = splat_int(kNearest), square_noise = splat_int(kNearest);
      if (s.stochastic) {
        U bits;
        memcpy(&bits, room.bits + at, sizeof bits);
        mean_noise = (I)(bits & 0xfffffu);
        square_noise = (I)(bits >> 12);
      }
      mean_codes[k] = encode_mean(load(room.mean + at), mean_inverse, mean_noise);
      square_codes[k] = encode_square(load(room.square + at), square_inverse, square_noise);
    }
    store_codes(states.mean + i + j, mean_codes);
    store_codes(states.square + i + j, square_codes);
  }
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
