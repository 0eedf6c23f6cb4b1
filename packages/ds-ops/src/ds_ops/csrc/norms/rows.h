// Rows, as the norms read them. Each row is read two or three times, but only the first time from
// memory: it fits into the nearest caches.
//
// A store and a later load whose addresses differ by a multiple of 4096 look alike to a processor
// until late, and the load waits. Rows of models are as long as that, so that code which works on
// several rows at once stores behind its loads.
#pragma once

#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// `step(sums[j], i, part)` over a row, on four sums side by side: one addition takes four cycles,
// and two can begin in each.
template <typename Step>
DS_INLINE float sum_over(int64_t width, const Step& step) {
  F sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= width; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) step(sums[j], i + j * kWidth, Whole{});
  }
  for (; i + kWidth <= width; i += kWidth) step(sums[0], i, Whole{});
  if (i < width) step(sums[1], i, Some{(int)(width - i)});
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
DS_INLINE float sum_of_squares(const T* x, int64_t width) {
  return sum_over(width, [&](F& sum, int64_t i, auto part) {
    const F v = load(x + i, part);
    sum += v * v;
  });
}

// Added to each other before they are added to a long sum, which keeps its error small.
template <int R>
DS_INLINE F sum_of_rows(const F (&rows)[R]) {
  if constexpr (R == 4) {
    return (rows[0] + rows[1]) + (rows[2] + rows[3]);
  } else {
    static_assert(R == 1);
    return rows[0];
  }
}

// sum = a + b, rounded to T: what follows reads it, as the layers behind it will.
template <typename T>
DS_INLINE void add(const T* a, const T* b, T* sum, int64_t width) {
  for_vectors(width, [&](int64_t i, auto part) {
    store(sum + i, load(a + i, part) + load(b + i, part), part);
  });
}

}  // namespace
}  // namespace DS_ISA
}  // namespace ds
