#include "moe/moe_permute.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

constexpr int kChunk = 4;  // vectors that are summed at a time: as many additions as overlap

// out = the weighted sum of the rows of one token, `vectors` vectors of it from `column` on.
template <typename T, int vectors>
DS_INLINE void gather(const MoeUnpermute& call, const int32_t* rows, const float* weights,
                      int64_t column, T* out) {
  F sums[vectors] = {};
  for (int64_t slot = 0; slot < call.k; ++slot) {
    if (rows[slot] < 0) continue;
    const T* y = static_cast<const T*>(call.y) + rows[slot] * call.width + column;
    const float weight = weights ? weights[slot] : 1.0f;
    for (int j = 0; j < vectors; ++j) sums[j] += load(y + j * kWidth) * weight;
  }
  for (int j = 0; j < vectors; ++j) store(out + column + j * kWidth, sums[j]);
}

template <typename T>
void forward(const MoeUnpermute& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  for (int64_t token = begin; token < end; ++token) {
    const int32_t* rows = call.row_map + token * call.k;
    const float* weights = call.weights ? call.weights + token * call.k : nullptr;
    T* out = static_cast<T*>(call.out) + token * width;
    int64_t i = 0;
    for (; i + kChunk * kWidth <= width; i += kChunk * kWidth) {
      gather<T, kChunk>(call, rows, weights, i, out);
    }
    for (; i + kWidth <= width; i += kWidth) gather<T, 1>(call, rows, weights, i, out);
    if (i == width) continue;
    const int rest = width - i;
    F sum = {};
    for (int64_t slot = 0; slot < call.k; ++slot) {
      if (rows[slot] < 0) continue;
      const T* y = static_cast<const T*>(call.y) + rows[slot] * width + i;
      sum += load_some(y, rest) * (weights ? weights[slot] : 1.0f);
    }
    store_some(out + i, sum, rest);
  }
}

// dy = weight * grad of one row; returns grad . y.
template <typename T>
float scatter(const T* grad, const T* y, float weight, T* dy, int64_t width) {
  F sums[kChunk] = {};
  int64_t i = 0;
  for (; i + kChunk * kWidth <= width; i += kChunk * kWidth) {
    for (int j = 0; j < kChunk; ++j) {
      const F g = load(grad + i + j * kWidth);
      sums[j] += g * load(y + i + j * kWidth);
      store(dy + i + j * kWidth, g * weight);
    }
  }
  for (; i < width; i += kWidth) {
    const int rest = width - i < kWidth ? width - i : kWidth;
    const F g = load_some(grad + i, rest);
    sums[0] += g * load_some(y + i, rest);
    store_some(dy + i, g * weight, rest);
  }
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void backward(const MoeUnpermuteBackward& call, int64_t begin, int64_t end) {
  const int64_t width = call.width;
  for (int64_t at = begin * call.k; at < end * call.k; ++at) {
    const int64_t row = call.row_map[at];
    const T* grad = static_cast<const T*>(call.grad) + at / call.k * width;
    if (row < 0) {
      if (call.weights) call.dweights[at] = 0.0f;
      continue;
    }
    T* dy = static_cast<T*>(call.dy) + row * width;
    if (call.weights) {
      const T* y = static_cast<const T*>(call.y) + row * width;
      call.dweights[at] = scatter(grad, y, call.weights[at], dy, width);
    } else {
      memcpy(dy, grad, width * sizeof(T));
    }
  }
}

}  // namespace

void moe_unpermute_rows(const MoeUnpermute& call, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { forward<decltype(as)>(call, begin, end); });
}

void moe_unpermute_backward_rows(const MoeUnpermuteBackward& call, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { backward<decltype(as)>(call, begin, end); });
}

}  // namespace DS_ISA
}  // namespace ds
