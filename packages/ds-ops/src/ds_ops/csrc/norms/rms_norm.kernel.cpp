#include "norms/rms_norm.h"

#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// Four sums side by side: one addition takes four cycles, and two can begin in each.
template <typename T>
float sum_of_squares(const T* x, int64_t width) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= width; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) {
      const F v = load(x + i + j * kWidth);
      sums[j] += v * v;
    }
  }
  for (; i + kWidth <= width; i += kWidth) {
    const F v = load(x + i);
    sums[0] += v * v;
  }
  if (i < width) {
    const F v = load_some(x + i, width - i);
    sums[1] += v * v;
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T, typename W>
void forward(const RmsNormForward& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const W* weight = static_cast<const W*>(call.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * width;
    T* y = static_cast<T*>(call.y) + row * width;
    const float mean = sum_of_squares(x, width) / (float)width;
    const float scale = 1.0f / __builtin_sqrtf(mean + call.eps);
    call.scale[row] = scale;
    int64_t i = 0;
    for (; i + kWidth <= width; i += kWidth) {
      store(y + i, load(x + i) * scale * load(weight + i));
    }
    if (i < width) {
      const int rest = width - i;
      store_some(y + i, load_some(x + i, rest) * scale * load_some(weight + i, rest), rest);
    }
  }
}

template <typename T, typename W>
void backward(const RmsNormBackward& call, float* dweight, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  const W* weight = static_cast<const W*>(call.weight);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(call.x) + row * width;
    const T* grad = static_cast<const T*>(call.grad) + row * width;
    T* dx = static_cast<T*>(call.dx) + row * width;
    const float scale = call.scale[row];
    F sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * kWidth <= width; i += 2 * kWidth) {
      for (int j = 0; j < 2; ++j) {
        const int64_t at = i + j * kWidth;
        sums[j] += load(grad + at) * load(weight + at) * load(x + at);
      }
    }
    for (; i < width; i += kWidth) {
      const int rest = width - i < kWidth ? width - i : kWidth;
      sums[0] += load_some(grad + i, rest) * load_some(weight + i, rest) * load_some(x + i, rest);
    }
    // mean(g * n) * scale, with n = x * scale.
    const float inner = sum_of(sums[0] + sums[1]) * scale * scale / (float)width;
    for (i = 0; i + kWidth <= width; i += kWidth) {
      const F g = load(grad + i);
      const F v = load(x + i);
      store(dx + i, (g * load(weight + i) - v * inner) * scale);
      store(dweight + i, load(dweight + i) + g * v * scale);
    }
    if (i < width) {
      const int rest = width - i;
      const F g = load_some(grad + i, rest);
      const F v = load_some(x + i, rest);
      store_some(dx + i, (g * load_some(weight + i, rest) - v * inner) * scale, rest);
      store_some(dweight + i, load_some(dweight + i, rest) + g * v * scale, rest);
    }
  }
}

}  // namespace

void rms_norm_rows(const RmsNormForward& call, int64_t begin, int64_t end) {
  const bool same = call.x_type == call.weight_type;
  switch (call.x_type) {
    case FloatType::fp32:
      return forward<float, float>(call, begin, end);
    case FloatType::bf16:
      return same ? forward<bf16, bf16>(call, begin, end) : forward<bf16, float>(call, begin, end);
    case FloatType::fp16:
      return same ? forward<fp16, fp16>(call, begin, end) : forward<fp16, float>(call, begin, end);
  }
}

void rms_norm_backward_rows(const RmsNormBackward& call, float* dweight, int64_t begin,
                            int64_t end) {
  const bool same = call.x_type == call.weight_type;
  switch (call.x_type) {
    case FloatType::fp32:
      return backward<float, float>(call, dweight, begin, end);
    case FloatType::bf16:
      return same ? backward<bf16, bf16>(call, dweight, begin, end)
                  : backward<bf16, float>(call, dweight, begin, end);
    case FloatType::fp16:
      return same ? backward<fp16, fp16>(call, dweight, begin, end)
                  : backward<fp16, float>(call, dweight, begin, end);
  }
}

}  // namespace DS_ISA
}  // namespace ds
