#include "bench/stream.h"

#include "common/simd.h"

namespace ds {
namespace DS_ISA {
namespace {

constexpr int kPerLine = kLine / sizeof(U);

DS_INLINE U read_line(const char* from, U sum) {
  for (int i = 0; i < kPerLine; ++i) {
    U v;
    memcpy(&v, from + i * sizeof v, sizeof v);
    sum += v;
  }
  return sum;
}

DS_INLINE void write_line(char* to, U v) {
  for (int i = 0; i < kPerLine; ++i) memcpy(to + i * sizeof v, &v, sizeof v);
}

// `to` is aligned to a line.
DS_INLINE void write_line_past_caches(char* to, U v) {
#if defined(__AVX512F__)
  _mm512_stream_si512((__m512i*)to, (__m512i)v);
#elif defined(__AVX2__)
  for (int i = 0; i < kPerLine; ++i) _mm256_stream_si256((__m256i*)to + i, (__m256i)v);
#elif defined(__x86_64__)
  for (int i = 0; i < kPerLine; ++i) _mm_stream_si128((__m128i*)to + i, (__m128i)v);
#else
  write_line(to, v);
#endif
}

// Where a step begins in a stream; a multiplication, because steps are short.
DS_INLINE int64_t begin_of(const Stream& stream, int64_t step, int64_t steps) {
  return step == steps ? stream.lines : (int64_t)(stream.lines_per_step * (double)step);
}

}  // namespace

uint32_t stream_steps(const Streams& call, int64_t begin, int64_t end) {
  // Four sums side by side: one chain of additions would be slower than the memory.
  U sums[4] = {};
  for (int64_t step = begin; step < end; ++step) {
    for (int s = 0; s < call.num_reads; ++s) {
      const Stream& stream = call.reads[s];
      int64_t line = begin_of(stream, step, call.steps);
      const int64_t stop = begin_of(stream, step + 1, call.steps);
      for (; line + 4 <= stop; line += 4) {
        for (int i = 0; i < 4; ++i) {
          sums[i] = read_line(stream.data + (line + i) * kLine, sums[i]);
        }
      }
      for (; line < stop; ++line) sums[0] = read_line(stream.data + line * kLine, sums[0]);
    }
    const U v = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int s = 0; s < call.num_writes; ++s) {
      const Stream& stream = call.writes[s];
      int64_t line = begin_of(stream, step, call.steps);
      const int64_t stop = begin_of(stream, step + 1, call.steps);
      if (stream.past_caches) {
        for (; line < stop; ++line) write_line_past_caches(stream.data + line * kLine, v);
      } else {
        for (; line < stop; ++line) write_line(stream.data + line * kLine, v);
      }
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
  const U v = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  uint32_t total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += v[lane];
  return total;
}

}  // namespace DS_ISA
}  // namespace ds
