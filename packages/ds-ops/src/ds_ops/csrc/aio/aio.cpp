// Asynchronous file I/O, as plain functions: what ds_ops.aio calls. Not operators of torch.
#include <errno.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <memory>

#include "aio/engine.h"

#define DS_EXPORT extern "C" __attribute__((visibility("default")))

using ds::aio::Engine;
using ds::aio::Request;
using ds::aio::Target;

namespace {

// statx(2), declared here since it is younger than the C library that we may be built with.
struct Statx {
  uint32_t mask, block;
  uint64_t fields[18];
  uint32_t memory_alignment, offset_alignment;  // of direct transfers
  uint64_t spare[12];
};
static_assert(sizeof(Statx) == 256);
constexpr uint32_t kStatxAlignment = 0x2000;
constexpr int kAtEmptyPath = 0x1000;

}  // namespace

// An engine of kind 0 (io_uring) or 1 (threads) that keeps up to `depth` pieces of about `block`
// bytes in flight, for any number of files. Null, and errno in `error`, if it cannot be had.
DS_EXPORT Engine* ds_aio_open(int kind, int depth, int64_t block, int* error) {
  *error = EINVAL;
  if (depth < 1 || block < 1 || block > (int64_t{1} << 30)) return nullptr;
  *error = 0;
  auto made = kind == 0 ? ds::aio::make_ring(depth, block, error)
                        : ds::aio::make_pool(depth, block, error);
  return made.release();
}

// Finishes every request, then ends the engine's threads.
DS_EXPORT void ds_aio_close(Engine* engine) { delete engine; }

// Begins to read or write; null if the arguments make no sense. The memory and both descriptors
// must stay as they are until it is done.
DS_EXPORT Request* ds_aio_submit(Engine* engine, int direct, int buffered, int64_t alignment,
                                 int64_t memory_alignment, int writes, char* memory, int64_t bytes,
                                 int64_t offset) {
  int64_t end = 0;
  if (bytes < 0 || offset < 0 || __builtin_add_overflow(bytes, offset, &end)) return nullptr;
  if (alignment < 1 || memory_alignment < 1 || buffered < 0) return nullptr;
  auto* request = new Request{{direct, buffered, alignment, memory_alignment},
                              writes != 0, memory, bytes, offset};
  engine->submit(request);
  return request;
}

DS_EXPORT int ds_aio_wait(Engine* engine, Request* request, double seconds) {
  return engine->wait(request, seconds) ? 1 : 0;
}

// Of a request that is done: errno, where that was, where the file ended (-1: not met), whether
// direct transfers were refused. The request is gone then.
DS_EXPORT void ds_aio_finish(Request* request, int64_t* result) {
  result[0] = request->error;
  result[1] = request->error_offset;
  result[2] = request->end_of_file;
  result[3] = request->direct_refused ? 1 : 0;
  delete request;
}

DS_EXPORT void ds_aio_counters(Engine* engine, ds::aio::Counters* counters) {
  *counters = engine->counters();
}

// What the file system asks of direct transfers: alignment of memory and of offsets, 0 if it has
// none. Returns -1 where the kernel does not say (before Linux 6.1).
DS_EXPORT int ds_aio_alignment(int file, int64_t* memory, int64_t* offset) {
  Statx found{};
  if (syscall(SYS_statx, file, "", kAtEmptyPath, kStatxAlignment, &found) != 0) return -1;
  if ((found.mask & kStatxAlignment) == 0) return -1;
  *memory = found.memory_alignment;
  *offset = found.offset_alignment;
  return 0;
}
