#include "gemm/weight_only_linear.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// Vectors that hold one input's weights for the 16 outputs of a block.
constexpr int kLanes = kBlock / kWidth;
// Bytes ahead of the codes in use that are asked for: memory is far away, and the processor's own
// prefetching stops at each page.
constexpr int kAhead = 2048;

#if defined(__AVX512F__)
constexpr bool kPermutes = true;
#else
constexpr bool kPermutes = false;
#endif

// kWidth signed bytes as ints. Written out, for compilers take the portable form lane by lane.
DS_INLINE I widen_bytes(const int8_t* from) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__x86_64__)
  const __m128i bytes = _mm_cvtsi32_si128(*(const int __attribute__((aligned(1), may_alias))*)from);
  const __m128i pairs = _mm_unpacklo_epi8(bytes, bytes);
  return (I)_mm_srai_epi32(_mm_unpacklo_epi16(pairs, pairs), 24);
#else
  B bytes;
  memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, I);
#endif
}

// --- Decoders: `kStep` inputs at a time; `weights(step, j, lane)` is input j's vector ------------

struct Int8 {
  static constexpr int kStep = 8;
  static constexpr int kStepBytes = kStep * kBlock;
  // What the decoded number is too large by; `prepare_rows` divides x by `divisor(k)`.
  static constexpr float kOffset = 0.0f;
  static float divisor(int64_t) { return 1.0f; }

  struct Step {
    const int8_t* codes;
  };
  DS_INLINE Step open(const uint8_t* codes) { return {(const int8_t*)codes}; }
  DS_INLINE F weights(const Step& step, int j, int lane) {
    return __builtin_convertvector(widen_bytes(step.codes + j * kBlock + lane * kWidth), F);
  }
};

// e4m3: a sign, four bits of exponent with bias 7, three of mantissa; no infinity.
struct Fp8 {
  static constexpr int kStep = 8;
  static constexpr int kStepBytes = kStep * kBlock;
  static constexpr float kOffset = 0.0f;
  static float divisor(int64_t) { return 1.0f; }

  using Step = Int8::Step;
  DS_INLINE Step open(const uint8_t* codes) { return Int8::open(codes); }
  DS_INLINE F weights(const Step& step, int j, int lane) {
    const U code = (U)widen_bytes(step.codes + j * kBlock + lane * kWidth);
    const U sign = code & 0x80000000u, bits = code & 127u;
    // As fp32 with the exponent's bias set right. Subnormals (below 8) then lack their hidden bit:
    // (8 + m) / 1024 where m / 512 is meant. A product by a power of two would do it as well, but
    // not where denormal numbers are flushed to zero.
    const F value = (F)((bits << 20) + 0x3c000000u);
    const F rest = (F)((U)((I)bits < 8) & (U)(value - 0.015625f));
    return (F)((U)(value + rest) | sign);
  }
};

struct Int4 {
  static constexpr int kStep = 8;
  static constexpr int kStepBytes = kBlock * 4;

#if defined(__AVX512F__)
  // A permutation looks 16 numbers up by the low 4 bits of each lane, and ignores the others.
  static constexpr float kOffset = 0.0f;
  static float divisor(int64_t) { return 1.0f; }

  struct Step {
    U words;
  };
  DS_INLINE Step open(const uint8_t* codes) {
    Step step;
    memcpy(&step.words, codes, sizeof step.words);
    return step;
  }
  DS_INLINE F weights(const Step& step, int j, int) {
    const F table = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    return (F)_mm512_permutexvar_ps((__m512i)(step.words >> (4 * j)), (__m512)table);
  }
#else
  // Codes are taken where they lie in their half of a word, as 16^(j % 4) times what they are, for
  // that spares a shift each; x has been divided by the same. Flipping the highest bit of a code
  // makes it code + 8, which is never negative.
  static constexpr float kOffset = 8.0f;
  static float divisor(int64_t k) { return (float)(1 << (4 * (k % 4))); }

  struct Step {
    U words[2][kLanes];
  };
  DS_INLINE Step open(const uint8_t* codes) {
    Step step;
    for (int lane = 0; lane < kLanes; ++lane) {
      U words;
      memcpy(&words, codes + lane * sizeof words, sizeof words);
      words ^= 0x88888888u;
      step.words[0][lane] = words;
      step.words[1][lane] = words >> 16;
    }
    return step;
  }
  DS_INLINE F weights(const Step& step, int j, int lane) {
    const U code = step.words[j / 4][lane] & (0xfu << (4 * (j % 4)));
    return __builtin_convertvector((I)code, F);
  }
#endif
};

// e3m2: a sign, three bits of exponent with bias 3, two of mantissa; no infinity, no NaN.
struct Fp6 {
  static constexpr int kStep = 16;
  static constexpr int kStepBytes = kBlock * 12;
  static constexpr float kOffset = 0.0f;
  static float divisor(int64_t) { return 1.0f; }

  struct Step {
    U words[3][kLanes];
  };
  DS_INLINE Step open(const uint8_t* codes) {
    Step step;
    for (int word = 0; word < 3; ++word)
      for (int lane = 0; lane < kLanes; ++lane)
        memcpy(&step.words[word][lane], codes + word * kBlock * 4 + lane * sizeof(U), sizeof(U));
    return step;
  }
  DS_INLINE F weights(const Step& step, int j, int lane) {
    const int bit = 6 * j % 32;
    U code = step.words[6 * j / 32][lane] >> bit;
    if (bit > 26) code |= step.words[6 * j / 32 + 1][lane] << (32 - bit);
    const U sign = (code << 26) & 0x80000000u;
#if defined(__AVX512F__)
    const F low = {0,    .0625f, .125f, .1875f, .25f, .3125f, .375f, .4375f,
                   .5f,  .625f,  .75f,  .875f,  1.f,  1.25f,  1.5f,  1.75f};
    const F high = {2.f, 2.5f, 3.f,  3.5f, 4.f,  5.f,  6.f,  7.f,
                    8.f, 10.f, 12.f, 14.f, 16.f, 20.f, 24.f, 28.f};
    const U size = (U)_mm512_permutex2var_ps((__m512)low, (__m512i)code, (__m512)high);
    return (F)(size | sign);
#else
    // As fp32 with the exponent's bias set right. Subnormals (below 4) then lack their hidden
    // bit: 1/8 + m/32 where m/16 is meant.
    const U bits = code & 31u;
    const F value = (F)((bits << 21) + 0x3e000000u);
    const F rest = (F)((U)((I)bits < 4) & (U)(value - 0.25f));
    return (F)((U)(value + rest) | sign);
#endif
  }
};

// --- One block of 16 outputs by `R` rows of x ----------------------------------------------------

DS_INLINE F load_as(const void* from, FloatType type, int64_t at) {
  switch (type) {
    case FloatType::fp32:
      return load((const float*)from + at);
    case FloatType::bf16:
      return load((const bf16*)from + at);
    default:
      return load((const fp16*)from + at);
  }
}

template <typename T>
DS_INLINE void write(const WeightOnlyLinear& call, int64_t row, int64_t at, F value) {
  const int64_t outputs = call.weight.outputs;
  T* y = (T*)call.y + row * outputs + at;
  const T* bias = (const T*)call.bias;
  if (at + kWidth <= outputs) {
    store(y, bias ? value + load(bias + at) : value);
  } else if (at < outputs) {
    const int rest = (int)(outputs - at);
    store_some(y, bias ? value + load_some(bias + at, rest) : value, rest);
  }
}

DS_INLINE void write_as(const WeightOnlyLinear& call, int64_t row, int64_t at, F value) {
  by_float_type(call.type, [&](auto as) { write<decltype(as)>(call, row, at, value); });
}

// `N` blocks from `index` on by `R` rows from `row` on. With little to add, there are more sums than
// one per output, side by side (an addition takes four cycles), and more blocks than one: memory
// delivers two streams faster than one.
template <typename Format, int R, int N = 1>
void block(const WeightOnlyLinear& call, int64_t index, int64_t row) {
  constexpr int kChains = R * N == 1 ? 4 : R * N == 2 ? 2 : 1;
  const PackedWeight& weight = call.weight;
  const int64_t depth = weight.depth, groups = weight.groups();
  const int64_t block_bytes = depth / Format::kStep * Format::kStepBytes;
  const uint8_t* codes = (const uint8_t*)weight.codes + index * block_bytes;
  const float* x = call.x + row * depth;
  const float* sums = call.sums + row * groups;
  F total[N][R][kLanes] = {};
  for (int64_t group = 0; group < groups; ++group) {
    F sum[N][R][kChains][kLanes] = {};
    for (int64_t k = 0; k < weight.group; k += Format::kStep) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const auto step = Format::open(codes + n * block_bytes);
        for (int ahead = 0; ahead < Format::kStepBytes; ahead += 64)
          __builtin_prefetch(codes + n * block_bytes + kAhead + ahead);
#pragma GCC unroll 16
        for (int j = 0; j < Format::kStep; ++j) {
          for (int lane = 0; lane < kLanes; ++lane) {
            const F w = Format::weights(step, j, lane);
            for (int r = 0; r < R; ++r) sum[n][r][j % kChains][lane] += w * x[r * depth + j];
          }
        }
      }
      codes += Format::kStepBytes;
      x += Format::kStep;
    }
    for (int n = 0; n < N; ++n) {
      const int64_t at = ((index + n) * groups + group) * kBlock;
      for (int lane = 0; lane < kLanes; ++lane) {
        const F scale = load_as(weight.scales, weight.scale_type, at + lane * kWidth);
        F zero = splat(Format::kOffset);
        if (weight.zeros) zero += load_as(weight.zeros, weight.scale_type, at + lane * kWidth);
        for (int r = 0; r < R; ++r) {
          F part = sum[n][r][0][lane];
          for (int chain = 1; chain < kChains; ++chain) part += sum[n][r][chain][lane];
          if (Format::kOffset != 0.0f || weight.zeros) part -= zero * sums[r * groups + group];
          total[n][r][lane] += part * scale;
        }
      }
    }
  }
  for (int n = 0; n < N; ++n)
    for (int r = 0; r < R; ++r)
      for (int lane = 0; lane < kLanes; ++lane)
        write_as(call, row + r, (index + n) * kBlock + lane * kWidth, total[n][r][lane]);
}

// As many rows at once as there are registers for their sums.
constexpr int kMostRows = kPermutes ? 8 : 4;

template <typename Format>
void blocks(const WeightOnlyLinear& call, int64_t begin, int64_t end) {
  if (call.rows == 1) {
    for (; begin + 2 <= end; begin += 2) block<Format, 1, 2>(call, begin, 0);
  }
  for (int64_t index = begin; index < end; ++index) {
    int64_t row = 0;
    for (; row + kMostRows <= call.rows; row += kMostRows) block<Format, kMostRows>(call, index, row);
    if (kMostRows > 4 && call.rows - row >= 4) {
      block<Format, 4>(call, index, row);
      row += 4;
    }
    if (call.rows - row >= 2) {
      block<Format, 2>(call, index, row);
      row += 2;
    }
    if (row < call.rows) block<Format, 1>(call, index, row);
  }
}

// --- The others ----------------------------------------------------------------------------------

template <typename Format>
void prepare(const PrepareRows& call, int64_t begin, int64_t end) {
  float factors[16];
  for (int j = 0; j < 16; ++j) factors[j] = 1.0f / Format::divisor(j);
  const int64_t groups = call.depth / call.group;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t group = 0; group < groups; ++group) {
      F sum = {};
      const int64_t first = row * call.depth + group * call.group;
      for (int64_t k = first; k < first + call.group; k += kWidth) {
        const F value = load_as(call.from, call.type, k);
        sum += value;
        store(call.to + k, value * load(factors + (k - first) % 16));
      }
      call.sums[row * groups + group] = sum_of(sum);
    }
  }
}

template <typename Format, typename T>
void dequantize(const DequantizeBlocks& call, int64_t begin, int64_t end) {
  const PackedWeight& weight = call.weight;
  const int64_t groups = weight.groups(), width = call.end - call.begin;
  for (int64_t index = begin; index < end; ++index) {
    const uint8_t* codes = (const uint8_t*)weight.codes +
                           (index * weight.depth + call.begin) / Format::kStep * Format::kStepBytes;
    const int64_t left = weight.outputs - index * kBlock;
    const int count = left < kBlock ? (int)left : kBlock;
    T* to = (T*)call.to + (index - call.first_block) * kBlock * width;
    for (int64_t k = 0; k < width; k += Format::kStep, codes += Format::kStepBytes) {
      const auto step = Format::open(codes);
      const int64_t at = (index * groups + (call.begin + k) / weight.group) * kBlock;
      T decoded[Format::kStep][kBlock];
      for (int lane = 0; lane < kLanes; ++lane) {
        const F scale = load_as(weight.scales, weight.scale_type, at + lane * kWidth);
        F zero = splat(Format::kOffset);
        if (weight.zeros) zero += load_as(weight.zeros, weight.scale_type, at + lane * kWidth);
#pragma GCC unroll 16
        for (int j = 0; j < Format::kStep; ++j) {
          const F value = Format::weights(step, j, lane) * (1.0f / Format::divisor(j));
          store(&decoded[j][lane * kWidth], (value - zero) * scale);
        }
      }
      for (int output = 0; output < count; ++output)
        for (int j = 0; j < Format::kStep; ++j) to[output * width + k + j] = decoded[j][output];
    }
  }
}

template <typename Format>
void dequantize_as(const DequantizeBlocks& call, int64_t begin, int64_t end) {
  if (call.type == FloatType::bf16) return dequantize<Format, bf16>(call, begin, end);
  return dequantize<Format, float>(call, begin, end);
}

}  // namespace

void prepare_rows(const PrepareRows& call, int64_t begin, int64_t end) {
  if (call.format == WeightFormat::int4) return prepare<Int4>(call, begin, end);
  return prepare<Int8>(call, begin, end);  // and of floats: none of them divides
}

void weight_only_linear_blocks(const WeightOnlyLinear& call, int64_t begin, int64_t end) {
  switch (call.weight.format) {
    case WeightFormat::int8:
      return blocks<Int8>(call, begin, end);
    case WeightFormat::int4:
      return blocks<Int4>(call, begin, end);
    case WeightFormat::fp8:
      return blocks<Fp8>(call, begin, end);
    default:
      return blocks<Fp6>(call, begin, end);
  }
}

void dequantize_blocks(const DequantizeBlocks& call, int64_t begin, int64_t end) {
  switch (call.weight.format) {
    case WeightFormat::int8:
      return dequantize_as<Int8>(call, begin, end);
    case WeightFormat::int4:
      return dequantize_as<Int4>(call, begin, end);
    case WeightFormat::fp8:
      return dequantize_as<Fp8>(call, begin, end);
    default:
      return dequantize_as<Fp6>(call, begin, end);
  }
}

}  // namespace DS_ISA
}  // namespace ds
