#include "gemm/grouped_mm.h"

#include "common/float_type.h"
#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

// Columns whose sums stay in the first-level cache.
constexpr int kTile = 512;
// Rows of b at once: as many streams as processors follow.
constexpr int kStreams = 8;

template <typename T>
DS_INLINE void put(T* to, float value) {
  if constexpr (sizeof(T) == 4) {
    *to = value;
  } else if constexpr (__is_same(T, bf16)) {
    *to = to_bf16(value);
  } else {
    *to = to_fp16(value);
  }
}

// Rows of b lie in memory: each is added, times one number of a, to a row of sums.
template <typename T, int R>
void by_rows(const FewRows& call, int64_t first, int count) {
  float sums[R][kTile] = {};
  const T* b = (const T*)call.b + first;
  for (int64_t k = 0; k < call.depth; k += kStreams) {
    const int streams = call.depth - k < kStreams ? (int)(call.depth - k) : kStreams;
    int i = 0;
    if (streams == kStreams) {
      for (; i + kWidth <= count; i += kWidth) {
        F sum[R];
        for (int r = 0; r < R; ++r) sum[r] = load(sums[r] + i);
        for (int s = 0; s < kStreams; ++s) {
          const F w = load(b + (k + s) * call.step_k + i);
          for (int r = 0; r < R; ++r) sum[r] += w * call.a[r * call.depth + k + s];
        }
        for (int r = 0; r < R; ++r) store(sums[r] + i, sum[r]);
      }
    }
    for (; i < count; ++i) {
      for (int s = 0; s < streams; ++s) {
        const float w = to_float(b[(k + s) * call.step_k + i]);
        for (int r = 0; r < R; ++r) sums[r][i] += w * call.a[r * call.depth + k + s];
      }
    }
  }
  for (int r = 0; r < call.rows; ++r)
    for (int i = 0; i < count; ++i)
      put((T*)call.out + r * call.width + first + i, sums[r][i]);
}

// Columns of b lie in memory: each number of out is a dot product.
template <typename T, int R>
void by_columns(const FewRows& call, int64_t begin, int64_t end) {
  constexpr int kColumns = 4;
  for (int64_t n = begin; n < end; n += kColumns) {
    const int columns = end - n < kColumns ? (int)(end - n) : kColumns;
    const T* b[kColumns];
    for (int c = 0; c < kColumns; ++c)
      b[c] = (const T*)call.b + (n + (c < columns ? c : 0)) * call.step_n;
    F sum[R][kColumns] = {};
    int64_t k = 0;
    for (; k + kWidth <= call.depth; k += kWidth) {
      F w[kColumns];
      for (int c = 0; c < kColumns; ++c) w[c] = load(b[c] + k);
      for (int r = 0; r < R; ++r) {
        const F x = load(call.a + r * call.depth + k);
        for (int c = 0; c < kColumns; ++c) sum[r][c] += w[c] * x;
      }
    }
    if (k < call.depth) {
      const int rest = (int)(call.depth - k);
      for (int r = 0; r < R; ++r) {
        const F x = load_some(call.a + r * call.depth + k, rest);
        for (int c = 0; c < kColumns; ++c) sum[r][c] += load_some(b[c] + k, rest) * x;
      }
    }
    for (int r = 0; r < call.rows; ++r)
      for (int c = 0; c < columns; ++c)
        put((T*)call.out + r * call.width + n + c, sum_of(sum[r][c]));
  }
}

template <typename T, int R>
void multiply(const FewRows& call, int64_t begin, int64_t end) {
  if (call.step_n != 1) return by_columns<T, R>(call, begin, end);
  for (int64_t first = begin; first < end; first += kTile)
    by_rows<T, R>(call, first, end - first < kTile ? (int)(end - first) : kTile);
}

template <typename T>
void multiply_rows(const FewRows& call, int64_t begin, int64_t end) {
  return call.rows == 1 ? multiply<T, 1>(call, begin, end)
                        : multiply<T, kRowsAtOnce>(call, begin, end);
}

}  // namespace

void multiply_few_rows(const FewRows& call, int64_t begin, int64_t end) {
  by_float_type(call.type, [&](auto as) { multiply_rows<decltype(as)>(call, begin, end); });
}

}  // namespace DS_ISA
}  // namespace ds
