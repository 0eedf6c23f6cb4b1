#include "layers/rope.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

struct Pair {
  F first, second;
};

DS_INLINE Pair rotated(Pair v, F cos, F sin) {
  return {v.first * cos - v.second * sin, v.second * cos + v.first * sin};
}

// --- Pairs side by side in memory: x0 y0 x1 y1... -----------------------------------------------

// Lane i of the result is lane from[i] of a, continued by b.
DS_INLINE F pick(F a, F b, I from) {
#if defined(__clang__)
  F v;
  for (int lane = 0; lane < kWidth; ++lane) {
    v[lane] = from[lane] < kWidth ? a[from[lane]] : b[from[lane] - kWidth];
  }
  return v;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

template <typename T>
DS_INLINE Pair load_pairs(const T* from) {
  I even, odd;
  for (int lane = 0; lane < kWidth; ++lane) {
    even[lane] = 2 * lane;
    odd[lane] = 2 * lane + 1;
  }
  const F a = load(from), b = load(from + kWidth);
  return {pick(a, b, even), pick(a, b, odd)};
}

template <typename T>
DS_INLINE void store_pairs(T* to, Pair v) {
  I lower, upper;
  for (int lane = 0; lane < kWidth; ++lane) {
    lower[lane] = lane / 2 + (lane % 2) * kWidth;
    upper[lane] = lower[lane] + kWidth / 2;
  }
  store(to, pick(v.first, v.second, lower));
  store(to + kWidth, pick(v.first, v.second, upper));
}

// A pair of bf16 is one 32-bit word: no lane needs to move.
DS_INLINE Pair load_pairs(const bf16* from) {
  U words;
  memcpy(&words, from, sizeof words);
  return {(F)(words << 16), (F)(words & 0xffff0000u)};
}

DS_INLINE void store_pairs(bf16* to, Pair v) {
  const U words = __builtin_convertvector(to_bf16_bits(v.first), U) |
                  (__builtin_convertvector(to_bf16_bits(v.second), U) << 16);
  memcpy(to, &words, sizeof words);
}

template <typename T>
DS_INLINE void rotate_interleaved(const T* x, T* y, const float* cos, const float* sin,
                                  float direction, int64_t pairs) {
  int64_t i = 0;
  for (; i + kWidth <= pairs; i += kWidth) {
    store_pairs(y + 2 * i, rotated(load_pairs(x + 2 * i), load(cos + i), load(sin + i) * direction));
  }
  if (i < pairs) {
    const Some part{(int)(pairs - i)};
    T padded[2 * kWidth] = {};
    memcpy(padded, x + 2 * i, 2 * part.count * sizeof(T));
    const F s = load(sin + i, part) * direction;
    store_pairs(padded, rotated(load_pairs(padded), load(cos + i, part), s));
    memcpy(y + 2 * i, padded, 2 * part.count * sizeof(T));
  }
}

// --- Pairs half a row apart: x0 x1... y0 y1... --------------------------------------------------

template <typename T>
DS_INLINE void rotate_halves(const T* x, T* y, const float* cos, const float* sin, float direction,
                             int64_t pairs) {
  for_vectors(pairs, [&](int64_t i, auto part) {
    const Pair v{load(x + i, part), load(x + pairs + i, part)};
    const Pair r = rotated(v, load(cos + i, part), load(sin + i, part) * direction);
    store(y + i, r.first, part);
    store(y + pairs + i, r.second, part);
  });
}

template <typename T>
void rotate(const Rope& call, int64_t begin, int64_t end) {
  const float direction = call.inverse ? -1.0f : 1.0f;
  const int64_t behind = 2 * call.pairs;
  int64_t inner = begin % call.size[2];
  int64_t middle = begin / call.size[2] % call.size[1];
  int64_t outer = begin / call.size[2] / call.size[1];
  const auto offset = [&](const int64_t (&stride)[3]) {
    return outer * stride[0] + middle * stride[1] + inner * stride[2];
  };
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + offset(call.x_stride);
    T* y = static_cast<T*>(call.y) + offset(call.y_stride);
    const int64_t at = offset(call.table_stride);
    if (call.interleaved) {
      rotate_interleaved(x, y, call.cos + at, call.sin + at, direction, call.pairs);
    } else {
      rotate_halves(x, y, call.cos + at, call.sin + at, direction, call.pairs);
    }
    if (x != y && behind < call.width) {
      memcpy(y + behind, x + behind, (call.width - behind) * sizeof(T));
    }
    if (++inner == call.size[2]) {
      inner = 0;
      if (++middle == call.size[1]) {
        middle = 0;
        ++outer;
      }
    }
  }
}

}  // namespace

void rope_rows(const Rope& call, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { rotate<decltype(as)>(call, begin, end); });
}

}  // namespace DS_ISA
}  // namespace ds
