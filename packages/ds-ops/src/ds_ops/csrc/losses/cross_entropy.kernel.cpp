#include "losses/cross_entropy.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// A row's logits go by once from memory: in blocks that stay in the nearest cache, each taken
// against the largest logit so far, as an online softmax does (Milakov and Gimelshein 2018,
// algorithm 3). The exponentials are kept, so that the gradient needs no second ones.

DS_INLINE float scalar_exponential(float v) { return exponential(splat(v))[0]; }

DS_INLINE void put(float* to, float v) { *to = v; }
DS_INLINE void put(bf16* to, float v) { *to = to_bf16(v); }
DS_INLINE void put(fp16* to, float v) { *to = to_fp16(v); }

// The logits as the loss sees them, and what their gradient is multiplied by.
struct Plain {
  F value(F logit) const { return logit; }
  F slope(F) const { return splat(1.0f); }
};

struct Capped {
  float cap, inverse;
  F value(F logit) const { return hyperbolic_tangent(logit * inverse) * cap; }
  F slope(F logit) const {
    const F t = hyperbolic_tangent(logit * inverse);
    return 1.0f - t * t;
  }
};

// Of a row: what its loss is made of.
struct Sums {
  float largest;       // of all logits
  float exponentials;  // sum of exp(logit - largest)
  float logits;        // their sum
};

// Fills `kept` with exp(logit - the largest up to that block), and `peaks` with those largest.
template <typename T, typename Map>
DS_INLINE Sums sum_up(const T* logits, int64_t classes, const Map& map, float* kept, float* peaks) {
  // Not -inf: that less itself is no number, and a block may hold nothing but -inf.
  Sums found{-3.0e38f, 0.0f, 0.0f};
  for (int64_t begin = 0, block = 0; begin < classes; begin += kCrossEntropyBlock, ++block) {
    const int64_t rest = classes - begin;
    const int64_t count = rest < kCrossEntropyBlock ? rest : kCrossEntropyBlock;
    const T* from = logits + begin;
    float* to = kept + begin;
    F peak = splat(found.largest);
    F total = {};
    for_vectors(count, [&](int64_t i, auto part) {
      const F v = map.value(load(from + i, part));
      total += inside(v, part);
      peak = maximum(peak, below(v, part));
      store(to + i, v, part);
    });
    const float largest = max_of(peak);
    F sums[2] = {};
    for_vectors(count, [&](int64_t i, auto part) {
      const F e = exponential(load(to + i, part) - largest);
      sums[i / kWidth % 2] += inside(e, part);
      store(to + i, e, part);
    });
    found.exponentials = found.exponentials * scalar_exponential(found.largest - largest) +
                         sum_of(sums[0] + sums[1]);
    found.largest = largest;
    found.logits += sum_of(total);
    peaks[block] = largest;
  }
  return found;
}

template <typename T, typename Map>
DS_INLINE void row_of(const CrossEntropy& call, const Map& map, float* scratch, int64_t row) {
  const int64_t classes = call.classes;
  const T* logits = static_cast<const T*>(call.logits) + row * classes;
  T* gradient = static_cast<T*>(call.gradient);
  if (gradient != nullptr) gradient += row * classes;
  const int64_t target = call.targets[row];
  if (target == call.ignored) {
    call.losses[row] = 0.0f;
    if (gradient != nullptr) memset(gradient, 0, classes * sizeof(T));
    return;
  }
  float* peaks = scratch + classes;
  const float target_raw = to_float(logits[target]);
  const Sums sums = sum_up(logits, classes, map, scratch, peaks);
  const float lse = sums.largest + __builtin_logf(sums.exponentials);
  const float target_logit = map.value(splat(target_raw))[0];
  const float spread = call.smoothing / (float)classes;
  float loss = lse - target_logit;
  // (1 - s) (lse - target) + s (lse - mean)
  if (call.smoothing != 0.0f) {
    loss += call.smoothing * target_logit - spread * sums.logits;
  }
  call.losses[row] = loss + call.z_loss * lse * lse;
  if (gradient == nullptr) return;

  const float scale = call.scale[call.scale_per_row ? row : 0];
  const float share = (1.0f + 2.0f * call.z_loss * lse) / sums.exponentials;
  const float minus = spread * scale;
  for (int64_t begin = 0, block = 0; begin < classes; begin += kCrossEntropyBlock, ++block) {
    const int64_t rest = classes - begin;
    const int64_t count = rest < kCrossEntropyBlock ? rest : kCrossEntropyBlock;
    const F factor = splat(share * scalar_exponential(peaks[block] - sums.largest) * scale);
    const float* kept = scratch + begin;
    for_vectors(count, [&](int64_t i, auto part) {
      const F slope = map.slope(load(logits + begin + i, part));
      store(gradient + begin + i, (load(kept + i, part) * factor - minus) * slope, part);
    });
  }
  const float probability =
      scratch[target] *
      scalar_exponential(peaks[target / kCrossEntropyBlock] - sums.largest) * share;
  const float slope = map.slope(splat(target_raw))[0];
  put(gradient + target, (probability - spread - (1.0f - call.smoothing)) * scale * slope);
}

template <typename T>
void rows_of(const CrossEntropy& call, float* scratch, int64_t begin, int64_t end) {
  if (call.softcap != 0.0f) {
    const Capped map{call.softcap, 1.0f / call.softcap};
    for (int64_t row = begin; row < end; ++row) row_of<T>(call, map, scratch, row);
  } else {
    for (int64_t row = begin; row < end; ++row) row_of<T>(call, Plain{}, scratch, row);
  }
}

}  // namespace

void cross_entropy_rows(const CrossEntropy& call, float* scratch, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { rows_of<decltype(as)>(call, scratch, begin, end); });
}

}  // namespace DS_ISA
}  // namespace ds
