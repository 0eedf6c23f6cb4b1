// A request to read or write a range of a file, and the pieces that it is cut into.
#pragma once

#include <cstdint>

namespace ds::aio {

// Direct transfers are not cut finer than this, nor is the engine's own aligned memory: a file
// that asks for more than it goes through the page cache.
constexpr int64_t kLargestAlignment = 65536;

// A file, opened once or twice by the caller, who keeps it open while requests are in flight.
struct Target {
  int direct;               // opened with O_DIRECT; -1: all goes through the page cache
  int buffered;             // opened without it
  int64_t alignment;        // of offsets and lengths of direct transfers: a multiple of the page
  int64_t memory_alignment; // of addresses of direct transfers
};

struct Request {
  Target target;
  bool writes;
  char* memory;
  int64_t bytes;
  int64_t offset;

  // All below belongs to the engine and is read and written under its mutex.
  int64_t planned = 0;      // bytes given to pieces so far
  int in_flight = 0;        // pieces that are under way
  bool queued = false;      // the engine may still look at it
  bool done = false;
  bool direct_refused = false;  // the file system took O_DIRECT at open, but not a transfer
  int error = 0;            // errno of the first piece that failed
  int64_t error_offset = 0;
  int64_t end_of_file = -1; // where a read met it; -1: it did not

  bool stops() const { return error != 0 || end_of_file >= 0 || planned == bytes; }
};

// What one system call moves.
struct Piece {
  Request* request = nullptr;
  char* memory = nullptr;   // the caller's
  char* bounce = nullptr;   // aligned memory in its place, or null
  int64_t offset = 0;       // in the file
  int64_t length = 0;
  int64_t moved = 0;        // of length
  bool direct = false;

  int file() const { return direct ? request->target.direct : request->target.buffered; }
  char* next_memory() const { return (bounce ? bounce : memory) + moved; }
  int64_t next_offset() const { return offset + moved; }
  int64_t rest() const { return length - moved; }
};

// The next piece of a request that does not stop, of at most about `block` bytes.
//
// Heads and tails, which are parts of aligned blocks, go through the page cache, where the kernel
// merges them with what else is in the page; whole blocks go around it. As blocks are whole pages,
// no page of one request is touched in both ways, and neighbours that share a page meet in the page
// cache: no byte outside the range is ever written.
Piece plan(Request& request, int64_t block);

}  // namespace ds::aio
