// The engine on an io_uring: one thread hands pieces to the kernel and takes their results.
#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <system_error>
#include <thread>
#include <vector>

#include "aio/engine.h"
#include "aio/uring.h"

namespace ds::aio {
namespace {

class Ring final : public Engine {
 public:
  Ring(int depth, int64_t block)
      : Engine(depth, block), pieces_(depth), event_(eventfd(0, EFD_CLOEXEC)) {
    for (int slot = depth; slot-- > 0;) free_.push_back(slot);
    if (event_ < 0) throw std::system_error(errno, std::generic_category());
    try {
      thread_ = std::thread([this] { run(); });
    } catch (...) {
      close(event_);
      throw;
    }
  }

  ~Ring() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      wake();
    }
    thread_.join();
    close(event_);
  }

  // 0, or with what the kernel refused.
  int opened() {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return opened_ >= 0; });
    return opened_;
  }

 protected:
  void wake() override {
    if (broken_) done_.notify_all();
    if (broken_ || signalled_) return;
    signalled_ = true;
    const uint64_t one = 1;
    while (write(event_, &one, sizeof one) < 0 && errno == EINTR) {
    }
  }

 private:
  void run() {
    block_signals();
    Uring uring;
    const int error = uring.open(static_cast<uint32_t>(depth_) + 1);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      opened_ = error;
      done_.notify_all();
    }
    if (error != 0) return;
    listen(uring);
    while (fill(uring)) {
      const int failure = uring.enter();
      // Busy: the kernel wants its completions taken first.
      if (failure != 0 && failure != EINTR && failure != EAGAIN && failure != EBUSY) {
        return give_up(failure);
      }
      reap(uring);
    }
  }

  // A read of the event, which completes when there is something new to do.
  void listen(Uring& uring) {
    uring.add(uring::kOpRead, event_, reinterpret_cast<char*>(&events_), sizeof events_, 0,
              static_cast<uint64_t>(depth_));
  }

  // Gives free slots to new pieces; false when all is done and the engine is to end.
  bool fill(Uring& uring) {
    while (!free_.empty()) {
      const int slot = free_.back();
      Piece& piece = pieces_[slot];
      {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!take(piece)) return in_flight_ > 0 || !closing_;
      }
      if (prepare(piece, slot)) {
        free_.pop_back();
        add(uring, slot);
      } else {
        const std::lock_guard<std::mutex> lock(mutex_);
        finish(piece);
      }
    }
    return true;
  }

  void add(Uring& uring, int slot) {
    const Piece& piece = pieces_[slot];
    uring.add(piece.request->writes ? uring::kOpWrite : uring::kOpRead, piece.file(),
              piece.next_memory(), static_cast<uint32_t>(piece.rest()), piece.next_offset(),
              static_cast<uint64_t>(slot));
  }

  void reap(Uring& uring) {
    uint64_t found = 0;
    int32_t result = 0;
    while (uring.next(&found, &result)) {
      const int slot = static_cast<int>(found);
      if (slot == depth_) {
        const std::lock_guard<std::mutex> lock(mutex_);
        signalled_ = false;
        listen(uring);
      } else if (advance(pieces_[slot], result) == Step::again) {
        add(uring, slot);
      } else {
        complete(slot);
        // Copying took its time: the kernel gets more to do before the next copy.
        if (pieces_[slot].bounce != nullptr && fill(uring)) uring.submit();
      }
    }
  }

  void complete(int slot) {
    free_.push_back(slot);
    const std::lock_guard<std::mutex> lock(mutex_);
    finish(pieces_[slot]);
  }

  // The kernel takes no more calls for this ring, as when the program has closed its descriptor:
  // every request fails, now and from now on.
  void give_up(int error) {
    std::vector<bool> waits(pieces_.size(), true);
    for (const int slot : free_) waits[slot] = false;
    for (size_t slot = 0; slot < pieces_.size(); ++slot) {
      if (waits[slot]) drop(pieces_[slot], error);
    }
    std::unique_lock<std::mutex> lock(mutex_);
    broken_ = true;
    Piece piece;
    while (true) {
      while (take(piece)) {
        lock.unlock();
        drop(piece, error);
        lock.lock();
      }
      if (closing_) return;
      done_.wait(lock);
    }
  }

  void drop(Piece& piece, int error) {
    piece.direct = false;
    advance(piece, -error);
    const std::lock_guard<std::mutex> lock(mutex_);
    finish(piece);
  }

  std::vector<Piece> pieces_;
  std::vector<int> free_;  // slots
  int event_;
  uint64_t events_ = 0;
  bool signalled_ = false;  // the event is set and not yet read
  bool broken_ = false;
  int opened_ = -1;
  std::thread thread_;
};

}  // namespace

std::unique_ptr<Engine> make_ring(int depth, int64_t block, int* error) {
  try {
    auto ring = std::make_unique<Ring>(depth, block);
    *error = ring->opened();
    return *error == 0 ? std::move(ring) : nullptr;
  } catch (const std::system_error& failure) {
    *error = failure.code().value();
    return nullptr;
  }
}

}  // namespace ds::aio
