// The rings shared with the kernel: entries go in at one, results come out at the other.
#pragma once

#include <cstddef>
#include <cstdint>

#include "aio/uring_abi.h"

namespace ds::aio {

class Uring {
 public:
  Uring() = default;
  Uring(const Uring&) = delete;
  ~Uring();

  // 0, or the errno with which the kernel refuses. Only the calling thread may use it then.
  int open(uint32_t entries);

  // Adds a transfer to what the next `enter` hands over; there is room for `entries` of them.
  void add(uint8_t opcode, int file, char* memory, uint32_t length, int64_t offset,
           uint64_t user_data);
  // Hands over what was added and waits for at least one completion. 0 or errno.
  int enter();
  // Hands over what was added; what the kernel does not take now, the next `enter` hands over.
  void submit();
  // The next completion, or false.
  bool next(uint64_t* user_data, int32_t* result);

 private:
  int probe() const;
  int enter(uint32_t least, uint32_t flags);

  int file_ = -1;
  uring::Parameters parameters_{};
  char* submission_ring_ = nullptr;
  char* completion_ring_ = nullptr;
  uring::Submission* entries_ = nullptr;
  size_t submission_bytes_ = 0, completion_bytes_ = 0, entries_bytes_ = 0;
  uint32_t added_ = 0;
};

}  // namespace ds::aio
