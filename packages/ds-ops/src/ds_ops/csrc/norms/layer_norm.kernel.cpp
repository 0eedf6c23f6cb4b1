#include "norms/layer_norm.h"

#include "common/float_type.h"
#include "common/simd.h"
#include "norms/rows.h"

namespace ds {
namespace DS_ISA {
namespace {

template <typename T>
DS_INLINE float mean_of(const T* x, int64_t width) {
  const float sum = sum_over(width, [&](F& part_sum, int64_t i, auto part) {
    part_sum += load(x + i, part);
  });
  return sum / (float)width;
}

// The mean of (x - mean)^2: of a row far from 0 the mean of x^2 less mean^2 would be noise.
template <typename T>
DS_INLINE float variance_of(const T* x, float mean, int64_t width) {
  const F center = splat(mean);
  const float sum = sum_over(width, [&](F& part_sum, int64_t i, auto part) {
    const F v = load(x + i, part) - inside(center, part);  // lanes behind the end add nothing
    part_sum += v * v;
  });
  return sum / (float)width;
}

template <typename T>
void forward(const LayerNormForward& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const float* weight = call.weight;
  const float* bias = call.bias;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * width;
    T* y = static_cast<T*>(call.y) + row * width;
    if (call.residual != nullptr) {
      T* sum = static_cast<T*>(call.sum) + row * width;
      add(x, static_cast<const T*>(call.residual) + row * width, sum, width);
      x = sum;
    }
    const float mean = mean_of(x, width);
    const float scale = 1.0f / __builtin_sqrtf(variance_of(x, mean, width) + call.eps);
    call.mean[row] = mean;
    call.scale[row] = scale;
    for_vectors(width, [&](int64_t i, auto part) {
      F v = (load(x + i, part) - mean) * scale * load(weight + i, part);
      if (bias != nullptr) v += load(bias + i, part);
      store(y + i, v, part);
    });
  }
}

// R rows at once, so that the weight and the sums are loaded and stored once for all of them.
template <int R, typename T>
DS_INLINE void backward_block(const LayerNormBackward& call, float* dweight, float* dbias,
                              int64_t first) {
  const int64_t width = call.width;
  const float* weight = call.weight;
  const T* grad = static_cast<const T*>(call.grad) + first * width;
  const T* x = static_cast<const T*>(call.x) + first * width;
  const T* grad_sum = static_cast<const T*>(call.grad_sum);
  if (grad_sum != nullptr) grad_sum += first * width;
  T* dx = static_cast<T*>(call.dx) + first * width;
  float mean[R], scale[R];
  for (int r = 0; r < R; ++r) {
    mean[r] = call.mean[first + r];
    scale[r] = call.scale[first + r];
  }
  F sums[R] = {}, products[R] = {};
  for_vectors(width, [&](int64_t i, auto part) {
    const F w = load(weight + i, part);
    for (int r = 0; r < R; ++r) {
      const F g = load(grad + r * width + i, part) * w;
      sums[r] += g;
      products[r] += g * (load(x + r * width + i, part) - mean[r]);
    }
  });
  float average[R], inner[R];  // of g = grad * weight; of g * n, times scale, n = (x - mean) * scale
  for (int r = 0; r < R; ++r) {
    average[r] = sum_of(sums[r]) / (float)width;
    inner[r] = sum_of(products[r]) * scale[r] * scale[r] / (float)width;
  }
  for_vectors(width, [&](int64_t i, auto part) {
    const F w = load(weight + i, part);
    F d[R], dw[R], db[R];  // stored behind all loads (see rows.h)
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * width + i;
      const F g = load(grad + at, part);
      const F v = load(x + at, part) - mean[r];
      dw[r] = g * (v * scale[r]);
      db[r] = g;
      d[r] = (g * w - average[r] - v * inner[r]) * scale[r];
      if (grad_sum != nullptr) d[r] += load(grad_sum + at, part);
    }
    for (int r = 0; r < R; ++r) store(dx + r * width + i, d[r], part);
    store(dweight + i, load(dweight + i, part) + sum_of_rows<R>(dw), part);
    store(dbias + i, load(dbias + i, part) + sum_of_rows<R>(db), part);
  });
}

template <typename T>
void backward(const LayerNormBackward& call, float* sums, int64_t begin, int64_t end) {
  float* dbias = sums + call.width;
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) backward_block<4, T>(call, sums, dbias, row);
  for (; row < end; ++row) backward_block<1, T>(call, sums, dbias, row);
}

}  // namespace

void layer_norm_rows(const LayerNormForward& call, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { forward<decltype(as)>(call, begin, end); });
}

void layer_norm_backward_rows(const LayerNormBackward& call, float* sums, int64_t begin,
                              int64_t end) {
  by_float_type(call.type, [&](auto as) { backward<decltype(as)>(call, sums, begin, end); });
}

}  // namespace DS_ISA
}  // namespace ds
