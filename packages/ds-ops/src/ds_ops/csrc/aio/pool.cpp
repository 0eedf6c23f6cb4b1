// The engine that works everywhere: threads that call pread and pwrite.
#include <errno.h>
#include <unistd.h>

#include <system_error>
#include <thread>
#include <vector>

#include "aio/engine.h"

namespace ds::aio {
namespace {

class Pool final : public Engine {
 public:
  Pool(int depth, int64_t block) : Engine(depth, block) {
    try {
      for (int index = 0; index < depth; ++index) threads_.emplace_back([this, index] { run(index); });
    } catch (...) {  // the threads that did start use this object
      end();
      throw;
    }
  }

  ~Pool() override { end(); }

 protected:
  void wake() override { work_.notify_one(); }

 private:
  void run(int slot) {
    block_signals();
    Piece piece;
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      if (take(piece)) {
        if (!queue_.empty()) work_.notify_one();  // there may be more for another thread
        lock.unlock();
        if (prepare(piece, slot)) move(piece);
        lock.lock();
        finish(piece);
      } else if (closing_) {
        return;
      } else {
        work_.wait(lock);
      }
    }
  }

  void move(Piece& piece) {
    int64_t result = 0;
    do {
      const auto count = static_cast<size_t>(piece.rest());
      result = piece.request->writes
                   ? pwrite(piece.file(), piece.next_memory(), count, piece.next_offset())
                   : pread(piece.file(), piece.next_memory(), count, piece.next_offset());
      if (result < 0) result = -errno;
    } while (advance(piece, result) == Step::again);
  }

  void end() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
      work_.notify_all();
    }
    for (auto& thread : threads_) thread.join();
  }

  std::condition_variable work_;
  std::vector<std::thread> threads_;
};

}  // namespace

std::unique_ptr<Engine> make_pool(int depth, int64_t block, int* error) {
  try {
    return std::make_unique<Pool>(depth, block);
  } catch (const std::system_error& failure) {
    *error = failure.code().value();
    return nullptr;
  }
}

}  // namespace ds::aio
