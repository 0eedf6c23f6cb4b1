#include "attention/paged_attention.h"

#include "attention/fp8_simd.h"
#include "common/float_type.h"
#include "common/simd.h"

// The lanes named, of two vectors laid end to end.
#if defined(__clang__)
#define DS_LANES(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DS_LANES(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif

namespace ds {
namespace DS_ISA {
namespace {

constexpr int kKeys = kAttentionKeys;
constexpr float kNone = -__builtin_inff();

// Registers allow four rows of four sums, or with sixteen registers two rows.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kFewStep = 4;
constexpr int kBlockRows = 8;
#else
constexpr int kFewStep = 2;
constexpr int kBlockRows = 4;
#endif
static_assert(kAttentionRowStep % kBlockRows == 0 && kAttentionMinDim >= kWidth);

// A row of `dim` floats as vectors. The last one ends where the row ends, and may overlap the one
// before it: no vector is partial. In scratch memory the vectors lie one behind the other.
struct Row {
  int dim;
  int whole;  // vectors without overlap
  int all;

  explicit Row(int64_t d) : dim(d), whole(d / kWidth), all((d + kWidth - 1) / kWidth) {}
  int at(int vector) const { return vector < whole ? vector * kWidth : dim - kWidth; }
};

// --- Lanes ----------------------------------------------------------------------------------------

DS_INLINE I lane_numbers() {
  I lanes;
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] = lane;
  return lanes;
}

// The sums of the lanes of a, b, c and d.
DS_INLINE void store_sums(float* to, F a, F b, F c, F d) {
#if defined(__AVX512F__)
  F ab = DS_LANES(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         DS_LANES(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  F cd = DS_LANES(c, d, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         DS_LANES(c, d, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  F all = DS_LANES(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          DS_LANES(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  all += DS_LANES(all, all, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  all += DS_LANES(all, all, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  all = DS_LANES(all, all, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#elif defined(__AVX2__)
  F ab = DS_LANES(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + DS_LANES(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  F cd = DS_LANES(c, d, 0, 1, 2, 3, 8, 9, 10, 11) + DS_LANES(c, d, 4, 5, 6, 7, 12, 13, 14, 15);
  F all = DS_LANES(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + DS_LANES(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  all += DS_LANES(all, all, 1, 0, 3, 2, 5, 4, 7, 6);
  all = DS_LANES(all, all, 0, 4, 2, 6, 0, 4, 2, 6);
#else
  F ab = DS_LANES(a, b, 0, 4, 1, 5) + DS_LANES(a, b, 2, 6, 3, 7);
  F cd = DS_LANES(c, d, 0, 4, 1, 5) + DS_LANES(c, d, 2, 6, 3, 7);
  F all = DS_LANES(ab, cd, 0, 1, 4, 5) + DS_LANES(ab, cd, 2, 3, 6, 7);
#endif
  memcpy(to, &all, 4 * sizeof(float));
}

// Lanes with (lane & step) == 0 of `a` and, one step to the right, of `b`; and the others.
template <int step>
DS_INLINE void exchange(F& a, F& b) {
  I low, high;
  for (int lane = 0; lane < kWidth; ++lane) {
    low[lane] = lane & step ? lane - step + kWidth : lane;
    high[lane] = lane & step ? lane + kWidth : lane + step;
  }
#if defined(__clang__)
  F first, second;
  for (int lane = 0; lane < kWidth; ++lane) {
    first[lane] = low[lane] < kWidth ? a[low[lane]] : b[low[lane] - kWidth];
    second[lane] = high[lane] < kWidth ? a[high[lane]] : b[high[lane] - kWidth];
  }
#else
  const F first = __builtin_shuffle(a, b, low);
  const F second = __builtin_shuffle(a, b, high);
#endif
  a = first;
  b = second;
}

template <int step>
DS_INLINE void transpose_step(F* rows) {
  for (int i = 0; i < kWidth; ++i) {
    if ((i & step) == 0) exchange<step>(rows[i], rows[i + step]);
  }
  if constexpr (step > 1) transpose_step<step / 2>(rows);
}

// --- Scores to weights ----------------------------------------------------------------------------

// e^v of v <= 0: zero below the smallest normal number, NaN of NaN.
DS_INLINE F weight_of(F v) {
  const F power = v < -87.0f ? F{} : exponential(v);
  return v == v ? power : v;
}

DS_INLINE float weight_of(float v) { return weight_of(splat(v))[0]; }

// Scores of one row in place to weights e^(score - max), zero outside of keys [begin, end).
// `largest` and `total` go on; returns by what sums of earlier keys are multiplied.
float to_weights(float* scores, int64_t begin, int64_t end, float softcap, float& largest,
                 float& total) {
  const I lanes = lane_numbers();
  const int first = begin < 0 ? 0 : begin > kKeys ? kKeys : (int)begin;
  const int last = end < 0 ? 0 : end > kKeys ? kKeys : (int)end;
  F best = splat(kNone);
  for (int key = 0; key < kKeys; key += kWidth) {
    F score = load(scores + key);
    if (softcap > 0.0f) score = hyperbolic_tangent(score / softcap) * softcap;
    const I lane = lanes + key;
    const I seen = (I)(lane >= first) & (I)(lane < last);
    score = seen ? score : splat(kNone);
    store(scores + key, score);
    best = maximum(score, best);  // a NaN is not larger: it shows in the weights
  }
  const float before = largest;
  const float now = max_of(best);
  if (now > before) largest = now;
  // Nothing seen so far: weights of 0, as -inf - 0 makes them.
  const float base = largest == kNone ? 0.0f : largest;
  F sum = {};
  for (int key = 0; key < kKeys; key += kWidth) {
    const F weight = weight_of(load(scores + key) - base);
    store(scores + key, weight);
    sum += weight;
  }
  const float factor = before == largest ? 1.0f : weight_of(before - base);
  total = total * factor + sum_of(sum);
  return factor;
}

// Which keys of those from `begin` on a row sees: queries see themselves and what is before.
struct Seen {
  int64_t begin, end;
};

DS_INLINE Seen seen_by(const PagedAttention& call, const AttentionPart& part, int64_t row,
                       int64_t key, int64_t keys) {
  const int64_t position = part.history + (part.first_row + row) / (call.heads / call.kv_heads);
  const int64_t begin = position + 1 - call.window - key;
  const int64_t end = position + 1 - key;
  return {begin, end < keys ? end : keys};
}

// --- Where keys, values and queries lie -----------------------------------------------------------

// Offsets of `count` keys from `key` on, in k and in v, of head 0; behind the last its own again, so
// that steps of several keys need no special case.
void find_keys(const PagedAttention& call, const AttentionPart& part, int64_t key, int count,
               int64_t* offsets) {
  const int32_t* table = call.table + part.sequence * call.table_width;
  int64_t block = key / call.block_size;
  int64_t inside = key % call.block_size;
  int64_t offset = 0;
  for (int i = 0; i < count; ++i) {
    offset = table[block] * call.block_stride + inside * call.token_stride;
    offsets[i] = offset;
    if (++inside == call.block_size) {
      inside = 0;
      ++block;
    }
  }
  for (int i = count; i < kKeys; ++i) offsets[i] = offset;
}

DS_INLINE int64_t row_offset(const PagedAttention& call, int64_t query_start, int64_t kv_head,
                             int64_t row) {
  const int64_t group = call.heads / call.kv_heads;
  return ((query_start + row / group) * call.heads + kv_head * group + row % group) * call.dim;
}

// Queries in fp32 and scaled. `once`: in the last vector, lanes that the one before has are 0.
template <typename T>
void load_queries_of(const PagedAttention& call, const AttentionPart& part, int64_t kv_head,
                     float* to, int64_t stride, bool once) {
  const Row row(call.dim);
  const float scale = call.scale * call.k_scales[kv_head];
  for (int64_t r = 0; r < part.rows; ++r) {
    const T* from = static_cast<const T*>(call.q) +
                    row_offset(call, part.query_start, kv_head, part.first_row + r);
    for (int i = 0; i < row.all; ++i) {
      F v = load(from + row.at(i)) * scale;
      if (once && i == row.whole) v = lane_numbers() >= row.all * kWidth - row.dim ? v : F{};
      store(to + r * stride + (once ? i * kWidth : row.at(i)), v);
    }
  }
}

void load_queries(const PagedAttention& call, const AttentionPart& part, int64_t kv_head, float* to,
                  int64_t stride, bool once) {
  by_float_type(call.type, [&](auto as) {
    load_queries_of<decltype(as)>(call, part, kv_head, to, stride, once);
  });
}

// Rows of a part, of one head.
DS_INLINE float* sums_of(const PagedAttention& call, const AttentionPart& part, int64_t head) {
  return part.sums + (head - part.kv_begin) * part.head_slots * attention_stride(call.dim);
}

DS_INLINE float* maxima_of(const AttentionPart& part, int64_t head) {
  return part.maxima + (head - part.kv_begin) * part.head_slots;
}

DS_INLINE float* weights_of(const AttentionPart& part, int64_t head) {
  return part.weights + (head - part.kv_begin) * part.head_slots;
}

// --- Few rows: keys and values are read where they lie --------------------------------------------
//
// Tokens are read in the order of memory, all heads of some tokens before the next few, and while
// they are used the next ones are fetched: else arithmetic and memory would wait for each other.

constexpr int kStep = 16;  // tokens

// What the step after this one reads: rows of as many tokens, at these offsets.
template <typename T>
struct Ahead {
  const T* base;
  const int64_t* offsets;
};

// A part of one token's row, into the second cache: the first has no room for a step.
template <typename T>
DS_INLINE void fetch(const T* from, int count) {
  for (int at = 0; at < count * (int)sizeof(T); at += 64) {
    __builtin_prefetch((const char*)from + at, 0, 2);
  }
}

// Adds to the products of `rows` queries and four keys those of one vector of each.
template <typename T, int rows>
DS_INLINE void dot_step(const T* const* keys, int at, const float* q, int64_t stride,
                        F (*sums)[4]) {
  F query[rows];
  for (int r = 0; r < rows; ++r) query[r] = load(q + r * stride);
  for (int j = 0; j < 4; ++j) {
    const F key = load(keys[j] + at);
    for (int r = 0; r < rows; ++r) sums[r][j] += query[r] * key;
  }
}

// scores[row][key] of `rows` rows and four keys.
template <typename T, int rows>
DS_INLINE void dot_four(const T* k, const int64_t* offsets, const Row& row, const float* q,
                        int64_t stride, float* scores) {
  const T* keys[4] = {k + offsets[0], k + offsets[1], k + offsets[2], k + offsets[3]};
  F sums[rows][4] = {};
  const int whole = row.whole * kWidth;
  for (int at = 0; at < whole; at += kWidth) dot_step<T, rows>(keys, at, q + at, stride, sums);
  if (row.whole < row.all) {
    dot_step<T, rows>(keys, row.dim - kWidth, q + whole, stride, sums);
  }
  for (int r = 0; r < rows; ++r) {
    store_sums(scores + r * kKeys, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
  }
}

// sums[row] = sums[row] * factor[row] + weights[row] * values, of some consecutive vectors. `v` and
// `sums` begin at the first of them.
template <typename T, int rows, int vectors>
DS_INLINE void add_values(const T* v, const int64_t* offsets, int count, const Ahead<T>* ahead,
                          const float* weights, const float* factors, float* sums,
                          int64_t stride) {
  F total[rows][vectors];
  for (int j = 0; j < vectors; ++j) {
    for (int r = 0; r < rows; ++r) {
      total[r][j] = load(sums + r * stride + j * kWidth) * factors[r];
    }
  }
  for (int key = 0; key < count; ++key) {
    const T* value = v + offsets[key];
    if (ahead) fetch(ahead->base + ahead->offsets[key], vectors * kWidth);
    F some[vectors];
    for (int j = 0; j < vectors; ++j) some[j] = load(value + j * kWidth);
    for (int r = 0; r < rows; ++r) {
      const float weight = weights[r * kKeys + key];
      for (int j = 0; j < vectors; ++j) total[r][j] += some[j] * weight;
    }
  }
  for (int j = 0; j < vectors; ++j) {
    for (int r = 0; r < rows; ++r) store(sums + r * stride + j * kWidth, total[r][j]);
  }
}

template <typename T, int rows>
DS_INLINE void values_of(const T* v, const int64_t* offsets, int count, const Ahead<T>* ahead,
                         const Row& row, const float* weights, const float* factors, float* sums,
                         int64_t stride) {
  int i = 0;
  for (; i + 4 <= row.whole; i += 4) {
    const Ahead<T> next = ahead ? Ahead<T>{ahead->base + i * kWidth, ahead->offsets} : Ahead<T>{};
    add_values<T, rows, 4>(v + i * kWidth, offsets, count, ahead ? &next : nullptr, weights,
                           factors, sums + i * kWidth, stride);
  }
  for (; i < row.all; ++i) {
    const Ahead<T> next = ahead ? Ahead<T>{ahead->base + row.at(i), ahead->offsets} : Ahead<T>{};
    add_values<T, rows, 1>(v + row.at(i), offsets, count, ahead ? &next : nullptr, weights, factors,
                           sums + i * kWidth, stride);
  }
}

// A tile of up to kKeys keys, and the memory of the heads of a part that it needs.
template <typename T>
struct Few {
  const PagedAttention& call;
  const AttentionPart& part;
  const Row row;
  const int64_t stride;
  const int rows;
  float* q;        // [heads, rows, stride]
  float* scores;   // [heads, rows, kKeys]
  float* factors;  // [heads, rows]

  float* scores_of(int64_t head) const { return scores + (head - part.kv_begin) * rows * kKeys; }

  // `then` is read after the last step of these.
  void score(const int64_t* offsets, int count, Ahead<T> then) const {
    const T* k = static_cast<const T*>(call.k);
    for (int key = 0; key < count; key += kStep) {
      const Ahead<T> ahead = key + kStep < count ? Ahead<T>{k, offsets + key + kStep} : then;
      for (int64_t head = part.kv_begin; head < part.kv_end; ++head) {
        const int64_t at = head * call.head_stride;
        const float* query = q + (head - part.kv_begin) * rows * stride;
        for (int some = 0; some < kStep && key + some < count; some += 4) {
          for (int j = some; j < some + 4; ++j) {
            fetch(ahead.base + at + ahead.offsets[j], row.dim);
          }
          const int64_t* four = offsets + key + some;
          float* to = scores_of(head) + key + some;
          int r = 0;
          for (; r + kFewStep <= rows; r += kFewStep) {
            dot_four<T, kFewStep>(k + at, four, row, query + r * stride, stride, to + r * kKeys);
          }
          if constexpr (kFewStep > 2) {
            for (; r + 2 <= rows; r += 2) {
              dot_four<T, 2>(k + at, four, row, query + r * stride, stride, to + r * kKeys);
            }
          }
          for (; r < rows; ++r) {
            dot_four<T, 1>(k + at, four, row, query + r * stride, stride, to + r * kKeys);
          }
        }
      }
    }
  }

  void weigh(int64_t key, int count) const {
    for (int64_t head = part.kv_begin; head < part.kv_end; ++head) {
      for (int r = 0; r < rows; ++r) {
        const Seen seen = seen_by(call, part, r, key, count);
        factors[(head - part.kv_begin) * rows + r] =
            to_weights(scores_of(head) + r * kKeys, seen.begin, seen.end, call.softcap,
                       maxima_of(part, head)[r], weights_of(part, head)[r]);
      }
    }
  }

  void add(const int64_t* offsets, int count, Ahead<T> then) const {
    const T* v = static_cast<const T*>(call.v);
    float ones[kAttentionFewRows];
    for (int r = 0; r < kAttentionFewRows; ++r) ones[r] = 1.0f;
    for (int key = 0; key < count; key += kStep) {
      const int some = count - key < kStep ? count - key : kStep;
      const Ahead<T> ahead = key + kStep < count ? Ahead<T>{v, offsets + key + kStep} : then;
      for (int64_t head = part.kv_begin; head < part.kv_end; ++head) {
        const int64_t at = head * call.head_stride;
        const Ahead<T> own = {ahead.base + at, ahead.offsets};
        const Ahead<T>* next = &own;  // once is enough
        const float* weights = scores_of(head) + key;
        const float* factor = key ? ones : factors + (head - part.kv_begin) * rows;
        float* sums = sums_of(call, part, head);
        int r = 0;
        for (; r + kFewStep <= rows; r += kFewStep, next = nullptr) {
          values_of<T, kFewStep>(v + at, offsets + key, some, next, row, weights + r * kKeys,
                                 factor + r, sums + r * stride, stride);
        }
        if constexpr (kFewStep > 2) {
          for (; r + 2 <= rows; r += 2, next = nullptr) {
            values_of<T, 2>(v + at, offsets + key, some, next, row, weights + r * kKeys, factor + r,
                            sums + r * stride, stride);
          }
        }
        for (; r < rows; ++r, next = nullptr) {
          values_of<T, 1>(v + at, offsets + key, some, next, row, weights + r * kKeys, factor + r,
                          sums + r * stride, stride);
        }
      }
    }
  }
};

template <typename T>
void few_rows(const PagedAttention& call, const AttentionPart& part, float* scratch) {
  const int64_t stride = attention_stride(call.dim);
  const int64_t heads = part.kv_end - part.kv_begin;
  float* scores = scratch + heads * part.rows * stride;
  const Few<T> few{call,           part,    Row(call.dim), stride,
                   (int)part.rows, scratch, scores,        scores + heads * part.rows * kKeys};
  for (int64_t head = part.kv_begin; head < part.kv_end; ++head) {
    load_queries(call, part, head, scratch + (head - part.kv_begin) * part.rows * stride, stride,
                    true);
  }
  const T* k = static_cast<const T*>(call.k);
  const T* v = static_cast<const T*>(call.v);
  int64_t found[2][kKeys];
  int64_t* offsets = found[0];
  int64_t* next = found[1];
  const auto count_from = [&](int64_t key) {
    const int64_t left = part.key_end - key;
    return (int)(left < kKeys ? left : kKeys);
  };
  int count = count_from(part.key_begin);
  find_keys(call, part, part.key_begin, count, offsets);
  for (int64_t key = part.key_begin; key < part.key_end; key += kKeys) {
    const int next_count = count_from(key + kKeys);
    if (next_count > 0) find_keys(call, part, key + kKeys, next_count, next);
    few.score(offsets, count, {v, offsets});
    few.weigh(key, count);
    few.add(offsets, count, next_count > 0 ? Ahead<T>{k, next} : Ahead<T>{v, offsets});
    int64_t* const used = offsets;
    offsets = next;
    next = used;
    count = next_count;
  }
}

// --- Many rows: keys and values are laid out for two matrix products ------------------------------

// c[kBlockRows, vectors] = c * factor + a b, with a [kBlockRows, inner] and b [inner, vectors].
template <int vectors>
DS_INLINE void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                              float* c, int64_t c_stride, int inner, const float* factors) {
  F total[kBlockRows][vectors];
  for (int r = 0; r < kBlockRows; ++r) {
    for (int j = 0; j < vectors; ++j) {
      total[r][j] = factors ? load(c + r * c_stride + j * kWidth) * factors[r] : F{};
    }
  }
  for (int i = 0; i < inner; ++i) {
    F right[vectors];
    for (int j = 0; j < vectors; ++j) right[j] = load(b + i * b_stride + j * kWidth);
    for (int r = 0; r < kBlockRows; ++r) {
      const float left = a[r * a_stride + i];
      for (int j = 0; j < vectors; ++j) total[r][j] += right[j] * left;
    }
  }
  for (int r = 0; r < kBlockRows; ++r) {
    for (int j = 0; j < vectors; ++j) store(c + r * c_stride + j * kWidth, total[r][j]);
  }
}

// c[rows, columns vectors] = c * factor + a b; without factors, a b. Rows: up to kBlockRows more.
void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
              int64_t c_stride, int rows, int inner, int columns, const float* factors) {
  int j = 0;
  for (; j + 2 <= columns; j += 2) {
    for (int r = 0; r < rows; r += kBlockRows) {
      multiply_block<2>(a + r * a_stride, a_stride, b + j * kWidth, b_stride,
                        c + r * c_stride + j * kWidth, c_stride, inner,
                        factors ? factors + r : nullptr);
    }
  }
  if (j < columns) {
    for (int r = 0; r < rows; r += kBlockRows) {
      multiply_block<1>(a + r * a_stride, a_stride, b + j * kWidth, b_stride,
                        c + r * c_stride + j * kWidth, c_stride, inner,
                        factors ? factors + r : nullptr);
    }
  }
}

// to[dim][kKeys] in fp32; keys behind the last are 0.
template <typename T>
void load_transposed(const T* k, const int64_t* offsets, int count, const Row& row, float* to) {
  for (int key = 0; key < kKeys; key += kWidth) {
    for (int i = 0; i < row.all; ++i) {
      const int at = row.at(i);
      F block[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        block[j] = key + j < count ? load(k + offsets[key + j] + at) : F{};
      }
      transpose_step<kWidth / 2>(block);
      for (int j = 0; j < kWidth; ++j) store(to + (int64_t)(at + j) * kKeys + key, block[j]);
    }
  }
}

template <typename T>
void load_values(const T* v, const int64_t* offsets, int count, const Row& row, float* to,
                 int64_t stride) {
  for (int key = 0; key < kKeys; ++key) {
    for (int i = 0; i < row.all; ++i) {
      store(to + key * stride + i * kWidth,
            key < count ? load(v + offsets[key] + row.at(i)) : F{});
    }
  }
}

template <typename T>
void many_rows(const PagedAttention& call, const AttentionPart& part, int64_t head,
               float* scratch) {
  const Row row(call.dim);
  const int64_t stride = attention_stride(call.dim);
  const int rows = part.rows;
  float* q = scratch;
  float* scores = q + kAttentionRows * stride;
  float* k = scores + kAttentionRows * kKeys;
  float* v = k + kKeys * stride;
  float* sums = sums_of(call, part, head);
  const int64_t at = head * call.head_stride;
  float factors[kAttentionRows];
  int64_t offsets[kKeys];
  // Rows up to a whole step: computed, and never looked at.
  const int padded = (rows + kBlockRows - 1) / kBlockRows * kBlockRows;
  memset(q + rows * stride, 0, (size_t)(padded - rows) * stride * sizeof(float));
  memset(sums + rows * stride, 0, (size_t)(padded - rows) * stride * sizeof(float));
  for (int r = rows; r < padded; ++r) factors[r] = 0.0f;
  load_queries(call, part, head, q, stride, false);
  for (int64_t key = part.key_begin; key < part.key_end; key += kKeys) {
    const int64_t left = part.key_end - key;
    const int count = left < kKeys ? left : kKeys;
    find_keys(call, part, key, count, offsets);
    load_transposed(static_cast<const T*>(call.k) + at, offsets, count, row, k);
    load_values(static_cast<const T*>(call.v) + at, offsets, count, row, v, stride);
    multiply(q, stride, k, kKeys, scores, kKeys, padded, row.dim, kKeys / kWidth, nullptr);
    for (int r = 0; r < rows; ++r) {
      const Seen seen = seen_by(call, part, r, key, count);
      factors[r] = to_weights(scores + r * kKeys, seen.begin, seen.end, call.softcap,
                              maxima_of(part, head)[r], weights_of(part, head)[r]);
    }
    multiply(scores, kKeys, v, stride, sums, stride, padded, kKeys, row.all, factors);
  }
}

template <typename T>
void compute(const PagedAttention& call, const AttentionPart& part, float* scratch) {
  for (int64_t head = part.kv_begin; head < part.kv_end; ++head) {
    memset(sums_of(call, part, head), 0,
           (size_t)(part.rows * attention_stride(call.dim)) * sizeof(float));
    for (int64_t r = 0; r < part.rows; ++r) {
      maxima_of(part, head)[r] = kNone;
      weights_of(part, head)[r] = 0.0f;
    }
    if (part.rows > kAttentionFewRows) many_rows<T>(call, part, head, scratch);
  }
  if (part.rows <= kAttentionFewRows) few_rows<T>(call, part, scratch);
}

template <typename T>
void combine(const PagedAttention& call, const AttentionResult& result) {
  const Row row(call.dim);
  const int64_t stride = attention_stride(call.dim);
  const float scale = call.v_scales[result.kv_head];
  for (int64_t r = 0; r < result.rows; ++r) {
    float largest = kNone;
    for (int64_t p = 0; p < result.parts; ++p) {
      const float other = result.maxima[p * result.part_rows + r];
      if (other > largest) largest = other;
    }
    const float base = largest == kNone ? 0.0f : largest;
    float total = 0.0f;
    float sums[attention_stride(kAttentionMaxDim)] = {};
    for (int64_t p = 0; p < result.parts; ++p) {
      const int64_t at = p * result.part_rows + r;
      const float factor = weight_of(result.maxima[at] - base);
      total += factor * result.weights[at];
      for (int i = 0; i < row.all * kWidth; i += kWidth) {
        store(sums + i, load(sums + i) + load(result.sums + at * stride + i) * factor);
      }
    }
    T* to = static_cast<T*>(call.out) +
            row_offset(call, result.query_start, result.kv_head, result.first_row + r);
    for (int i = 0; i < row.all; ++i) {
      store(to + row.at(i), load(sums + i * kWidth) / total * scale);
    }
  }
}

}  // namespace

void attention_part(const PagedAttention& call, const AttentionPart& part, float* scratch) {
  switch (call.cache_type) {
    case CacheType::e4m3:
      return compute<e4m3>(call, part, scratch);
    case CacheType::e5m2:
      return compute<e5m2>(call, part, scratch);
    default:
      by_float_type(call.type, [&](auto as) { compute<decltype(as)>(call, part, scratch); });
  }
}

void attention_combine(const PagedAttention& call, const AttentionResult& result) {
  by_float_type(call.type, [&](auto as) { combine<decltype(as)>(call, result); });
}

}  // namespace DS_ISA
}  // namespace ds
