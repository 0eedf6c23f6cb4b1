#include "quant/quantize.h"

#include "common/simd.h"
#include "quant/bits.h"
#include "quant/codes.h"
#include "quant/floats.h"

namespace ds {
namespace DS_ISA {
namespace {

// Blocks are worked on in chunks of this many numbers, in fp32, which stay in the first cache. A
// multiple of 8, so that a chunk's codes begin at a byte.
constexpr int64_t kChunk = 2048;
// Numbers behind the end of a chunk that a last, whole vector may reach.
constexpr int64_t kRoom = kWidth;

// The least scale: its inverse is finite.
constexpr float kLeastScale = 0x1p-126f;

struct Chunk {
  float values[kChunk + kRoom] __attribute__((aligned(64)));
  uint8_t codes[2 * (kChunk + kRoom)] __attribute__((aligned(64)));
};

// --- Codes to numbers ---------------------------------------------------------------------------

// to[i] = value of code i * scale + zero, or that added to what is there.
template <bool kFloat, bool kAdd, typename Code>
void decode_as(const Code* codes, const BlockFormat& given, float scale, float zero, float* to,
               int64_t count) {
  const BlockFormat format = given;  // a copy, which no store can change
  for (int64_t i = 0; i < count; i += kWidth) {
    const I found = load_codes(codes + i);
    const F value = kFloat ? floats_of(found, format) : integers_of(found, format);
    // Adding -0 changes nothing, not even a -0.
    const F number = unfused(value * scale) + zero;
    store(to + i, kAdd ? load(to + i) + number : number);
  }
}

template <bool kAdd>
void decode(const uint8_t* packed, const BlockFormat& format, float scale, float zero, float* to,
            int64_t count, uint8_t* room) {
  const uint8_t* codes = packed;
  if (format.bits != 8 || count % kWidth != 0) {
    unpack(packed, room, count, format.bits);
    codes = room;
  }
  if (format.bits == 12) {
    const uint16_t* wide = reinterpret_cast<const uint16_t*>(codes);
    decode_as<true, kAdd>(wide, format, scale, zero, to, count);
  } else if (format.is_float) {
    decode_as<true, kAdd>(codes, format, scale, zero, to, count);
  } else {
    decode_as<false, kAdd>(codes, format, scale, zero, to, count);
  }
}

// The sum over ranks, in their order.
void load_sum(const QuantizeCall& call, int64_t index, int64_t at, int64_t count, Chunk& chunk) {
  const QuantizedPieces& pieces = call.pieces;
  const int64_t first_code = (index * call.block + at) * pieces.format.bits / 8;
  const int64_t rank_codes = call.blocks * call.block * pieces.format.bits / 8;
  for (int64_t rank = 0; rank < pieces.ranks; ++rank) {
    const int64_t block = rank * call.blocks + index;
    const float scale = pieces.scales[block];
    const float zero = pieces.zeros != nullptr ? pieces.zeros[block] : -0.0f;
    const uint8_t* codes = pieces.codes + rank * rank_codes + first_code;
    const auto add = rank == 0 ? decode<false> : decode<true>;
    add(codes, pieces.format, scale, zero, chunk.values, count, chunk.codes);
  }
  if (pieces.factor != 1.0f) {
    for (int64_t i = 0; i < count; i += kWidth) {
      store(chunk.values + i, load(chunk.values + i) * pieces.factor);
    }
  }
}

// What is quantized: numbers [at, at + count) of block `index`.
void fill(const QuantizeCall& call, int64_t index, int64_t at, int64_t count, Chunk& chunk) {
  const int64_t start = index * call.block + at;
  if (call.x != nullptr) {
    load_floats(call.x, call.x_type, start, chunk.values, count);
  } else {
    load_sum(call, index, at, count, chunk);
  }
  if (call.error == nullptr) return;
  float error[kChunk + kRoom];
  load_floats(call.error, call.error_type, start, error, count);
  for (int64_t i = 0; i < count; i += kWidth) {
    store(chunk.values + i, unfused(load(chunk.values + i)) + load(error + i));
  }
}

// --- The range of a block -----------------------------------------------------------------------

struct Range {
  I magnitude;  // the largest |x| as bits: infinity is above all numbers, NaN above infinity
  F lowest;
  F highest;
};

int32_t largest_of(I v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t largest = v[0];
  for (int lane = 1; lane < kWidth; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

DS_INLINE void extend(Range& range, F v) {
  range.magnitude = max_int(range.magnitude, (I)((U)v & 0x7fffffffu));
  range.lowest = minimum(range.lowest, v);
  range.highest = maximum(range.highest, v);
}

template <bool kSymmetric>
void extend_over(Range& range, const float* values, int64_t count) {
  Range found = range;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const F v = load(values + i);
    if constexpr (kSymmetric) {
      found.magnitude = max_int(found.magnitude, (I)((U)v & 0x7fffffffu));
    } else {
      extend(found, v);
    }
  }
  for (; i < count; ++i) extend(found, splat(values[i]));
  range = found;
}

struct Scale {
  float scale;  // NaN if a number is not finite
  float zero;   // what is taken off before the scale
  float inverse;
};

Scale scale_of(const QuantizeCall& call, const Range& range) {
  const int32_t bits = largest_of(range.magnitude);
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  float zero = 0.0f;
  float extent = largest;
  if (!call.format.symmetric) {
    zero = -max_of(-range.lowest);
    extent = max_of(range.highest) - zero;
  }
  const float scale = extent * call.format.inverse_max;
  // Written so that a NaN fails; the sum of two finite numbers may be infinite as well.
  if (!(largest < __builtin_inff() && extent < __builtin_inff())) {
    return Scale{__builtin_nanf(""), 0.0f, 0.0f};
  }
  const float kept = scale > kLeastScale ? scale : kLeastScale;
  return Scale{kept, zero, 1.0f / kept};
}

// --- Numbers to codes ---------------------------------------------------------------------------

template <bool kStochastic, bool kFloat, typename Code>
void encode_as(const float* values, const BlockFormat& given, const Scale& scaling, int64_t at,
               Key key, Code* codes, int64_t count) {
  const BlockFormat format = given;  // copies, which no store can change
  const Scale scale = scaling;
  U place = {};
  for (int lane = 0; lane < kWidth; ++lane) place[lane] = (uint32_t)at + lane;
  for (int64_t i = 0; i < count; i += kWidth, place += kWidth) {
    const F v = unfused((load(values + i) - scale.zero) * scale.inverse);
    const I found = kFloat ? float_codes<kStochastic>(v, format, place, key)
                           : integer_codes<kStochastic>(v, format, place, key);
    store_codes(codes + i, found);
  }
}

template <bool kStochastic>
void encode(const float* values, const BlockFormat& format, const Scale& scale, int64_t at, Key key,
            uint8_t* codes, int64_t count) {
  if (format.bits == 12) {
    uint16_t* wide = reinterpret_cast<uint16_t*>(codes);
    encode_as<kStochastic, true>(values, format, scale, at, key, wide, count);
  } else if (format.is_float) {
    encode_as<kStochastic, true>(values, format, scale, at, key, codes, count);
  } else {
    encode_as<kStochastic, false>(values, format, scale, at, key, codes, count);
  }
}

// error = beta * error + (1 - beta) * (what was quantized - what its codes say).
void update_error(const QuantizeCall& call, int64_t start, const Scale& scale,
                  const uint8_t* packed, int64_t count, Chunk& chunk) {
  float told[kChunk + kRoom];
  float error[kChunk + kRoom];
  const float zero = call.format.symmetric ? -0.0f : scale.zero;
  decode<false>(packed, call.format, scale.scale, zero, told, count, chunk.codes);
  load_floats(call.error, call.error_type, start, error, count);
  const float rest = 1.0f - call.beta;
  for (int64_t i = 0; i < count; i += kWidth) {
    const F lost = load(chunk.values + i) - load(told + i);
    store(error + i, unfused(load(error + i) * call.beta) + unfused(lost * rest));
  }
  store_floats(error, call.error, call.error_type, start, count);
}

void encode_chunk(const QuantizeCall& call, int64_t index, int64_t at, int64_t count,
                  const Scale& scale, uint8_t* packed, Chunk& chunk) {
  // Whole vectors of single bytes need no packing.
  const bool direct = call.format.bits == 8 && count % kWidth == 0;
  uint8_t* codes = direct ? packed : chunk.codes;
  const Key key = key_of(call.seed, index);
  const auto encode_with = call.stochastic ? encode<true> : encode<false>;
  encode_with(chunk.values, call.format, scale, at, key, codes, count);
  if (!direct) pack(chunk.codes, packed, count, call.format.bits);
}

void quantize_block(const QuantizeCall& call, int64_t index, Chunk& chunk) {
  const int64_t block = call.block;
  Range range = {I{}, splat(__builtin_inff()), splat(-__builtin_inff())};
  for (int64_t at = 0; at < block; at += kChunk) {
    const int64_t count = block - at < kChunk ? block - at : kChunk;
    fill(call, index, at, count, chunk);
    const auto extend_range = call.format.symmetric ? extend_over<true> : extend_over<false>;
    extend_range(range, chunk.values, count);
  }
  const Scale scale = scale_of(call, range);
  const int64_t part = call.blocks / (call.outer * call.inner);
  const int64_t i = index / part / call.inner;
  const int64_t j = index / part % call.inner;
  const int64_t place = (j * call.outer + i) * part + index % part;
  call.scales[place] = scale.scale;
  if (call.zeros != nullptr) call.zeros[place] = scale.zero;
  uint8_t* packed = call.codes + place * block * call.format.bits / 8;
  if (scale.scale != scale.scale) {  // the error stays as it was: the step will be skipped
    memset(packed, 0, block * call.format.bits / 8);
    return;
  }
  for (int64_t at = 0; at < block; at += kChunk) {
    const int64_t count = block - at < kChunk ? block - at : kChunk;
    if (block > kChunk) fill(call, index, at, count, chunk);
    uint8_t* to = packed + at * call.format.bits / 8;
    encode_chunk(call, index, at, count, scale, to, chunk);
    if (call.error != nullptr) update_error(call, index * block + at, scale, to, count, chunk);
  }
}

}  // namespace

void quantize_blocks(const QuantizeCall& call, int64_t begin, int64_t end) {
  Chunk chunk;
  for (int64_t index = begin; index < end; ++index) quantize_block(call, index, chunk);
}

void dequantize_blocks(const DequantizeCall& call, int64_t begin, int64_t end) {
  Chunk chunk;
  for (int64_t index = begin; index < end; ++index) {
    const float scale = call.scales[index];
    const float zero = call.zeros != nullptr ? call.zeros[index] : -0.0f;
    for (int64_t at = 0; at < call.block; at += kChunk) {
      const int64_t count = call.block - at < kChunk ? call.block - at : kChunk;
      const int64_t start = index * call.block + at;
      const uint8_t* packed = call.codes + start * call.format.bits / 8;
      decode<false>(packed, call.format, scale, zero, chunk.values, count, chunk.codes);
      store_floats(chunk.values, call.y, call.y_type, start, count);
    }
  }
}

int64_t first_not_finite(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (!(__builtin_fabsf(from[i]) < __builtin_inff())) return i;
  }
  return count;
}

}  // namespace DS_ISA
}  // namespace ds
