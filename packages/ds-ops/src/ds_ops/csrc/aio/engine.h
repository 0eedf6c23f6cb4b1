// What engines share: the queue of requests, how a piece goes on or ends, and waiting.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>

#include "aio/request.h"

namespace ds::aio {

struct Counters {
  int64_t bytes = 0;           // moved
  int64_t pieces = 0;
  int64_t buffered_bytes = 0;  // of them through the page cache
  int64_t bounced_bytes = 0;   // of them through aligned memory of the engine
  int64_t continued = 0;       // pieces that went on after a short transfer or an interruption
  int64_t peak_in_flight = 0;  // pieces
};

// Aligned memory for the pieces whose own is not, on huge pages where there are some. It is taken
// from the system when it is first used.
class Bounces {
 public:
  Bounces(int count, int64_t bytes);
  ~Bounces();
  Bounces(const Bounces&) = delete;
  char* get(int slot);  // null: there is no memory

 private:
  const int count_;
  const int64_t stride_;
  std::once_flag once_;
  char* memory_ = nullptr;
};

class Engine {
 public:
  Engine(int depth, int64_t block) : depth_(depth), block_(block), bounces_(depth, block) {}
  // Derived classes finish what is in flight and end their threads.
  virtual ~Engine() = default;

  void submit(Request* request);
  // Whether it is done, after waiting up to so many seconds.
  bool wait(Request* request, double seconds);
  Counters counters();

 protected:
  enum class Step { again, finished };

  // Called with the mutex held, after a request was put into the queue.
  virtual void wake() = 0;

  // With the mutex held: the next piece, or false if no request has one.
  bool take(Piece& piece);
  // Without it: gives the piece the aligned memory of a slot if it needs that, and fills it for a
  // write. False: it has failed.
  bool prepare(Piece& piece, int slot);
  // Without it: what a system call returned (bytes, or -errno). `again`: call it for the rest.
  Step advance(Piece& piece, int64_t result);
  // With it: nothing is under way for the piece any more.
  void finish(const Piece& piece);

  const int depth_;
  const int64_t block_;
  std::mutex mutex_;
  std::condition_variable done_;
  std::deque<Request*> queue_;
  bool closing_ = false;
  int in_flight_ = 0;
  Counters counters_;

 private:
  Bounces bounces_;

  void settle(Request& request);
  void fail(Request& request, int error, int64_t offset);
};

// One thread and an io_uring. Null, and errno in `error`, where the kernel has none for us.
std::unique_ptr<Engine> make_ring(int depth, int64_t block, int* error);
// `depth` threads that call pread and pwrite. Null where threads cannot be started.
std::unique_ptr<Engine> make_pool(int depth, int64_t block, int* error);

// In a thread of an engine: leave all signals to the program's own threads.
void block_signals();

}  // namespace ds::aio
