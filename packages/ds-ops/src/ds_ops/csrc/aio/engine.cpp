#include "aio/engine.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>

namespace ds::aio {

namespace {
constexpr int64_t kHugePage = 2 << 20;
}  // namespace

// A piece may be longer than a block where a block is less than what the file asks.
Bounces::Bounces(int count, int64_t bytes)
    : count_(count),
      stride_((bytes + kLargestAlignment - 1) / kLargestAlignment * kLargestAlignment) {}

Bounces::~Bounces() { free(memory_); }

char* Bounces::get(int slot) {
  std::call_once(once_, [&] {
    const auto bytes = static_cast<size_t>(count_ * stride_);
    void* fresh = nullptr;
    if (posix_memalign(&fresh, kHugePage, bytes) != 0) return;
    // Only advice. A device fills one huge page faster than hundreds of scattered ones.
    madvise(fresh, bytes, MADV_HUGEPAGE);
    memory_ = static_cast<char*>(fresh);
  });
  return memory_ == nullptr ? nullptr : memory_ + slot * stride_;
}

void Engine::submit(Request* request) {
  const std::lock_guard<std::mutex> lock(mutex_);
  request->queued = true;
  queue_.push_back(request);
  wake();
}

bool Engine::wait(Request* request, double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto done = [&] { return request->done; };
  if (seconds <= 0) return done();
  return done_.wait_for(lock, std::chrono::duration<double>(seconds), done);
}

Counters Engine::counters() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return counters_;
}

bool Engine::take(Piece& piece) {
  while (!queue_.empty()) {
    Request& request = *queue_.front();
    if (!request.stops()) {
      piece = plan(request, block_);
      ++counters_.pieces;
      counters_.peak_in_flight = std::max<int64_t>(counters_.peak_in_flight, ++in_flight_);
      return true;
    }
    queue_.pop_front();
    request.queued = false;
    settle(request);
  }
  return false;
}

bool Engine::prepare(Piece& piece, int slot) {
  const Request& request = *piece.request;
  const auto address = reinterpret_cast<uintptr_t>(piece.memory);
  if (!piece.direct || address % static_cast<uintptr_t>(request.target.memory_alignment) == 0) {
    return true;
  }
  piece.bounce = bounces_.get(slot);
  if (piece.bounce == nullptr) {
    const std::lock_guard<std::mutex> lock(mutex_);
    fail(*piece.request, ENOMEM, piece.offset);
    return false;
  }
  if (request.writes) memcpy(piece.bounce, piece.memory, static_cast<size_t>(piece.length));
  return true;
}

Engine::Step Engine::advance(Piece& piece, int64_t result) {
  Request& request = *piece.request;
  if (result > 0) {
    piece.moved += result;
    if (piece.rest() == 0) {
      if (piece.bounce != nullptr && !request.writes) {
        memcpy(piece.memory, piece.bounce, static_cast<size_t>(piece.length));
      }
      return Step::finished;
    }
    // A short transfer goes on, and around the page cache only from where a block begins.
    if (piece.next_offset() % request.target.alignment != 0) piece.direct = false;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ++counters_.continued;
  if (result > 0 || result == -EINTR || result == -EAGAIN) return Step::again;
  if (result == -EINVAL && piece.direct) {
    request.direct_refused = true;
    piece.direct = false;
    return Step::again;
  }
  if (result < 0) {
    fail(request, static_cast<int>(-result), piece.next_offset());
  } else if (request.writes) {
    fail(request, EIO, piece.next_offset());  // nothing was written, and no reason given
  } else {
    const int64_t end = piece.next_offset();
    request.end_of_file = request.end_of_file < 0 ? end : std::min(request.end_of_file, end);
    if (piece.bounce != nullptr) {
      memcpy(piece.memory, piece.bounce, static_cast<size_t>(piece.moved));
    }
  }
  return Step::finished;
}

void Engine::finish(const Piece& piece) {
  counters_.bytes += piece.moved;
  if (!piece.direct) counters_.buffered_bytes += piece.moved;
  if (piece.bounce != nullptr) counters_.bounced_bytes += piece.moved;
  --in_flight_;
  --piece.request->in_flight;
  settle(*piece.request);
}

void Engine::settle(Request& request) {
  // Whoever waits may free it as soon as it is done: the queue must not hold it then.
  if (request.queued || request.in_flight != 0) return;
  request.done = true;
  done_.notify_all();
}

void Engine::fail(Request& request, int error, int64_t offset) {
  // Of several errors the one that lies first in the file.
  if (request.error == 0 || offset < request.error_offset) {
    request.error = error;
    request.error_offset = offset;
  }
}

void block_signals() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, nullptr);
}

}  // namespace ds::aio
