#include "bench/stream.h"

#include <atomic>

#include "common/op.h"

namespace ds {
namespace {

// Below this a thread is not worth its start; as in torch's own elementwise kernels.
constexpr int64_t kGrainBytes = 64 * 1024;

}  // namespace
}  // namespace ds

// Runs over all streams once, with torch.get_num_threads() threads, in steps of about `step_bytes`
// of the longest of them. Addresses and sizes: those that are read, then those that are written.
// Returns a sum of what was read; 0 at once if there are too many streams.
extern "C" __attribute__((visibility("default"))) uint32_t ds_ops_stream(
    const uint64_t* addresses, const int64_t* sizes, int num_reads, int num_writes,
    int64_t step_bytes, int past_caches) {
  if (num_reads > ds::kMaxStreams || num_writes > ds::kMaxStreams) return 0;
  ds::Streams call{};
  call.num_reads = num_reads;
  call.num_writes = num_writes;
  int64_t longest = 0;
  int64_t total = 0;
  for (int i = 0; i < num_reads + num_writes; ++i) {
    ds::Stream& stream = i < num_reads ? call.reads[i] : call.writes[i - num_reads];
    stream = {reinterpret_cast<char*>(addresses[i]), sizes[i] / ds::kLine, 0.0, false};
    // Non-temporal stores need whole lines, and what was just read is in the caches anyway.
    if (i >= num_reads && past_caches) stream.past_caches = addresses[i] % ds::kLine == 0;
    for (int j = 0; j < num_reads; ++j) {
      if (addresses[j] == addresses[i]) stream.past_caches = false;
    }
    longest = stream.lines > longest ? stream.lines : longest;
    total += stream.lines;
  }
  if (longest == 0) return 0;
  call.steps = (longest * ds::kLine + step_bytes - 1) / step_bytes;
  for (int i = 0; i < num_reads + num_writes; ++i) {
    ds::Stream& stream = i < num_reads ? call.reads[i] : call.writes[i - num_reads];
    stream.lines_per_step = static_cast<double>(stream.lines) / static_cast<double>(call.steps);
  }
  const int64_t bytes_per_step = total * ds::kLine / call.steps + 1;
  std::atomic<uint32_t> sum{0};
  const auto kernel = DS_BEST(stream_steps);
  ds::parallel(call.steps, ds::kGrainBytes / bytes_per_step + 1, [&](int64_t begin, int64_t end) {
    sum.fetch_add(kernel(call, begin, end), std::memory_order_relaxed);
  });
  return sum.load();
}
