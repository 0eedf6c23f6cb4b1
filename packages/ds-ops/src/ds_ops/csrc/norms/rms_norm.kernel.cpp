#include "norms/rms_norm.h"

#include "common/float_type.h"
#include "common/simd.h"
#include "norms/rows.h"

namespace ds {
namespace DS_ISA {
namespace {

template <typename T>
void forward(const RmsNormForward& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const float* weight = call.weight;
  // Of short rows a few at once: the square root of one need not be awaited.
  constexpr int kMost = 8;
  const int64_t size = width * sizeof(T) <= 1024 ? kMost : 1;
  for (int64_t first = begin; first < end; first += size) {
    const int64_t count = first + size <= end ? size : end - first;
    const T* x = static_cast<const T*>(call.x) + first * width;
    T* y = static_cast<T*>(call.y) + first * width;
    if (call.residual != nullptr) {
      T* sum = static_cast<T*>(call.sum) + first * width;
      add(x, static_cast<const T*>(call.residual) + first * width, sum, count * width);
      x = sum;
    }
    float scale[kMost];
    for (int64_t r = 0; r < count; ++r) {
      const float mean = sum_of_squares(x + r * width, width) / (float)width;
      scale[r] = call.scale[first + r] = 1.0f / __builtin_sqrtf(mean + call.eps);
    }
    for (int64_t r = 0; r < count; ++r, x += width, y += width) {
      const F s = splat(scale[r]);
      for_vectors(width, [&](int64_t i, auto part) {
        store(y + i, load(x + i, part) * s * load(weight + i, part), part);
      });
    }
  }
}

// R rows at once, so that the weight and its gradient are loaded and stored once for all of them.
template <int R, typename T>
DS_INLINE void backward_block(const RmsNormBackward& call, float* dweight, int64_t first) {
  const int64_t width = call.width;
  const float* weight = call.weight;
  const T* grad = static_cast<const T*>(call.grad) + first * width;
  const T* x = static_cast<const T*>(call.x) + first * width;
  const T* grad_sum = static_cast<const T*>(call.grad_sum);
  if (grad_sum != nullptr) grad_sum += first * width;
  T* dx = static_cast<T*>(call.dx) + first * width;
  F sums[R] = {};
  for_vectors(width, [&](int64_t i, auto part) {
    const F w = load(weight + i, part);
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * width + i;
      sums[r] += load(grad + at, part) * w * load(x + at, part);
    }
  });
  float scale[R], inner[R];
  for (int r = 0; r < R; ++r) {
    scale[r] = call.scale[first + r];
    // mean(g * n) * scale, with n = x * scale.
    inner[r] = sum_of(sums[r]) * scale[r] * scale[r] / (float)width;
  }
  for_vectors(width, [&](int64_t i, auto part) {
    const F w = load(weight + i, part);
    F d[R], dw[R];  // stored behind all loads: rows lie a multiple of 4096 bytes apart (see rows.h)
    for (int r = 0; r < R; ++r) {
      const int64_t at = r * width + i;
      const F g = load(grad + at, part);
      const F v = load(x + at, part);
      dw[r] = g * (v * scale[r]);
      d[r] = (g * w - v * inner[r]) * scale[r];
      if (grad_sum != nullptr) d[r] += load(grad_sum + at, part);
    }
    for (int r = 0; r < R; ++r) store(dx + r * width + i, d[r], part);
    store(dweight + i, load(dweight + i, part) + sum_of_rows<R>(dw), part);
  });
}

template <typename T>
void backward(const RmsNormBackward& call, float* dweight, int64_t begin, int64_t end) {
  int64_t row = begin;
  for (; row + 4 <= end; row += 4) backward_block<4, T>(call, dweight, row);
  for (; row < end; ++row) backward_block<1, T>(call, dweight, row);
}

}  // namespace

void rms_norm_rows(const RmsNormForward& call, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { forward<decltype(as)>(call, begin, end); });
}

void rms_norm_backward_rows(const RmsNormBackward& call, float* dweight, int64_t begin,
                            int64_t end) {
  by_float_type(call.type, [&](auto as) { backward<decltype(as)>(call, dweight, begin, end); });
}

}  // namespace DS_ISA
}  // namespace ds
