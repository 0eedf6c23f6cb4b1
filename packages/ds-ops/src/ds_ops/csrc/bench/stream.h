// The least that a kernel must do with memory: read some streams, write others, and add.
//
// Its time is the floor that benchmarks of bandwidth-bound kernels are measured against.
#pragma once

#include <stdint.h>

#include "common/isa.h"

namespace ds {

constexpr int kMaxStreams = 16;
constexpr int64_t kLine = 64;

struct Stream {
  char* data;
  int64_t lines;         // of kLine bytes; a rest is left alone
  double lines_per_step;
  bool past_caches;      // written with non-temporal stores
};

struct Streams {
  Stream reads[kMaxStreams];
  Stream writes[kMaxStreams];
  int num_reads;
  int num_writes;
  int64_t steps;  // into which every stream is cut, in the same proportion
};

}  // namespace ds

// Steps [begin, end): reads the part of each stream that is read, then writes that of the others.
// Returns a sum of all that was read, so that no compiler can leave it out.
DS_KERNEL(uint32_t, stream_steps, const Streams& call, int64_t begin, int64_t end)
